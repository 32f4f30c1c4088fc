import json

from dit_accel.cli import main
from dit_accel.diffusers import known_families

ROWS = {model: family for family in known_families() for model in family.models}


def test_every_class_is_listed(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line for line in lines[1:-1]}
    assert set(listed) == set(ROWS)
    assert "video" in listed["WanTransformer3DModel"]
    assert "image" in listed["FluxTransformer2DModel"]
    assert lines[-1].startswith(f"{len(ROWS)} classes.")


def test_json(capsys):
    assert main(["models", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["command"]) == (1, "models")
    models = {entry["model"]: entry for entry in document["models"]}
    assert set(models) == set(ROWS)
    assert all(entry["grid"] and entry["installed"] for entry in models.values())
    vace = models["WanVACETransformer3DModel"]
    assert vace["sites"] == [r"vace_blocks\.\d+\.attn1", r"blocks\.\d+\.attn1"]
    assert (vace["text"], vace["padding"], vace["stock"]) == ("none", "", "cross-attention")
    padding = {model: entry["padding"] for model, entry in models.items()}
    assert padding["QwenImageTransformer2DModel"] == "live keys per sample, moved behind the grid"
    assert padding["MochiTransformer3DModel"] == "cut by the model"
    assert padding["CogVideoXTransformer3DModel"] == "attended to, as by the stock model"


def test_markdown_has_a_row_per_class_and_as_many_cells_as_its_head(capsys):
    assert main(["models", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(ROWS)
    cells = [line.replace(r"\|", "").count("|") for line in lines]
    assert len(set(cells)) == 1


def test_one_class_and_one_family_in_full(capsys):
    assert main(["models", "LTX2VideoTransformer3DModel"]) == 0
    text = capsys.readouterr().out
    assert "audio to video" in text
    assert "num_frames, height, width" in text
    assert "FluxTransformer2DModel" not in text
    assert main(["models", "cogvideox"]) == 0
    assert "ConsisIDTransformer3DModel" in capsys.readouterr().out


def test_an_unknown_class_gets_a_suggestion(capsys):
    assert main(["models", "WanTransformer3DModell"]) == 2
    assert "did you mean 'WanTransformer3DModel'?" in capsys.readouterr().err
