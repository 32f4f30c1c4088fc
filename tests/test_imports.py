"""The import arrows of the house, laziness, and that we never shadow another package."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"kernels": "dit_accel.kernels", "pipelines": "dit_accel.pipelines", "eval": "dit_accel.eval",
           "assets": "dit_accel.assets", "dit_accel": "dit_accel"}  # fmt: skip
OPTIONAL = {"cv2", "matplotlib", "flash_attn", "sageattention", "natten", "flashinfer", "PIL", "triton"}


def modules():
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            yield ".".join(part for part in parts if part != "__init__"), path


def layer(module):
    for name in ("kernels", "diffusers", "methods", "pipelines", "eval", "cli", "assets"):
        if module == f"dit_accel.{name}" or module.startswith(f"dit_accel.{name}."):
            return name
    return "core"


def imports(module, path, *, top_only=False):
    """Absolute names that a module imports; with ``top_only`` those that run when it is imported."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if top_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            # What type checkers read, and what runs when the file itself is the program.
            if isinstance(child, ast.If) and re.search("TYPE_CHECKING|__main__", ast.dump(child.test)):
                continue
            yield child
            yield from walk(child)

    for node in walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


ALLOWED = {
    "kernels": {"kernels"},
    "core": {"core", "kernels", "methods"},
    "methods": {"core", "kernels", "methods"},
    "diffusers": {"core", "kernels", "methods", "diffusers"},
    "pipelines": {"core", "kernels", "methods", "diffusers", "pipelines", "assets"},
    "eval": {"core", "kernels", "methods", "diffusers", "pipelines", "eval", "assets"},
    "assets": set(),
}


# Dense attention of others, used where it is installed; imported inside functions (the test of optional packages).
DETECTED = {"flash_attn", "flash_attn_interface", "sageattention"}


def test_arrows_never_run_back():
    wrong = []
    for module, path in modules():
        own = layer(module)
        if own == "cli" or module == "dit_accel" or module.endswith("__main__"):  # entry points
            continue
        for name in imports(module, path):
            if name.split(".")[0] == "dit_accel" and layer(name) not in ALLOWED[own]:
                wrong.append(f"{module} imports {name}")
            top = name.split(".")[0]
            if own in ("kernels", "core", "methods") and top in ("diffusers", "transformers", "accelerate"):
                wrong.append(f"{module} imports {name}")
            if own == "kernels" and top not in {*sys.stdlib_module_names, "torch", "triton", "dit_accel", *DETECTED}:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_seam_knows_methods_through_their_base_only():
    named = {"radial", "gna", "clear", "paro", "adaspa", "vmoba", "pisa", "rectified", "pyramid", "testing"}
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        if layer(module) == "diffusers"
        for name in imports(module, path)
        if name.startswith("dit_accel.methods.") and name.split(".")[2] in named
    ]
    assert not wrong, "\n".join(wrong)


def test_no_optional_package_is_imported_at_top_level():
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        # The kernels' own files may: the tier is imported lazily by the one module that chooses it.
        if "triton" not in path.name and path.name != "tuning.py"
        for name in imports(module, path, top_only=True)
        if name.split(".")[0] in OPTIONAL
    ]
    assert not wrong, "\n".join(wrong)


def test_files_stay_short():
    long = {m: n for m, p in modules() if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def run(code, cwd=None):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd)
    return done.stdout.strip()


def test_the_package_and_its_cli_import_without_torch():
    loaded = "import sys, dit_accel, dit_accel.cli; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    assert run(loaded) == "False False"


def test_every_public_name_resolves():
    assert run("import dit_accel; print(all(getattr(dit_accel, n) is not None for n in dit_accel.__all__))") == "True"


@pytest.mark.parametrize("name", ["kernels", "pipelines", "eval", "assets"])
def test_no_top_level_package_of_ours(name, tmp_path):
    """Asked from another folder: from the root of the checkout any folder of it is importable."""
    found = run(f"from importlib.util import find_spec as f; s = f({name!r}); print(s and s.origin)", cwd=tmp_path)
    assert not found.startswith(str(ROOT))
