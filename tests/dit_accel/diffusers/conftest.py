"""What the tests of this folder record for the generated table of features (`python -m dit_accel.eval.features`)."""

import pytest


@pytest.fixture
def record_feature(record_property):
    """Call it with (feature, model, result) once a test has shown what it shows."""

    def record(feature, model, result):
        record_property("feature", feature)
        record_property("model", model)
        record_property("result", result)

    return record
