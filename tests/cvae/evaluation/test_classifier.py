import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cvae.data.experiment_data import ExperimentData, open_data
from cvae.errors import UserError
from cvae.evaluation import classifier
from cvae.evaluation.classifier import reference_classifier
from tests.conftest import write_store
from tests.helpers.trained_runs import make_run

CPU = torch.device("cpu")


@pytest.fixture
def data(home: Path) -> ExperimentData:
    write_store(home, captioned=False, sizes=(1500, 200))
    return open_data(make_run().experiment())


def test_it_tells_real_classes_apart_and_notices_wrong_ones(data: ExperimentData) -> None:
    judge = reference_classifier(data, CPU)
    assert judge.real_accuracy > 0.95
    assert data.val.labels is not None
    images, labels = np.array(data.val.images), data.val.labels
    accuracy = judge.sample_accuracy(images, labels)
    assert accuracy.overall == pytest.approx(judge.real_accuracy)
    assert list(accuracy.per_class) == ["low", "middle", "high"]
    assert judge.sample_accuracy(images, (labels + 1) % 3).overall < 0.05


def test_it_is_kept_until_data_or_file_change(
    data: ExperimentData, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = []
    real = classifier._train

    def counted(*arguments: object) -> None:
        trainings.append(1)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(classifier, "_train", counted)
    first = reference_classifier(data, CPU)
    again = reference_classifier(data, CPU)
    assert len(trainings) == 1
    images = np.array(data.val.images)
    assert np.array_equal(first.classify(images), again.classify(images))
    assert again.real_accuracy == first.real_accuracy

    file = data.store.path.with_name("tiny-16.classifier.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert reference_classifier(data, CPU).real_accuracy == first.real_accuracy
    assert len(trainings) == 2

    facts = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps({**facts, "data": "other"}))
    reference_classifier(data, CPU)
    assert len(trainings) == 3


def test_captioned_data_have_no_classes(tiny_captioned_store: Path) -> None:
    with pytest.raises(UserError, match="has no labels"):
        reference_classifier(open_data(make_run(captioned=True).experiment()), CPU)
