"""The README.md of an exported model: a model card (Mitchell et al. 2019) in the Hugging Face hub's form."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from cvae import metrics
from cvae.config.experiment import Experiment
from cvae.models.cvae import Cvae
from cvae.sampling.export_format import SAMPLES, ExportedModel

_LIKELIHOODS = {
    "bernoulli": "Bernoulli (binary cross-entropy, summed)",
    "gaussian": "Gaussian of fixed variance (squared error, summed)",
    "optimal_gaussian": "Gaussian of the optimal variance (σ-VAE)",
}


def model_card(
    exported: ExportedModel, experiment: Experiment, model: Cvae, prompts: Sequence[str]
) -> str:
    """Returns Markdown after the hub's YAML front matter. prompts: examples of what the model draws."""
    # Imported late: drawing with an exported model needs no jinja2.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "thousands": "{:,}".format,
        "quote": shlex.quote,
        "file_name": lambda path: Path(path).name,
        "product": math.prod,
        "shape": lambda sizes: str(tuple(sizes)),
        "meaning": _meaning,
    }
    return environment.get_template("model_card.md.j2").render(
        exported=exported,
        experiment=experiment,
        model=model,
        likelihood=_LIKELIHOODS[experiment.model.likelihood],
        samples=SAMPLES,
        prompts=list(prompts),
        first_prompt=json.dumps(prompts[:1], ensure_ascii=False) if prompts else None,
        front_matter=_front_matter(exported, experiment),
    )


def _front_matter(exported: ExportedModel, experiment: Experiment) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    is_captioned = experiment.model.condition == "text"
    task = "text-to-image" if is_captioned else "unconditional-image-generation"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=exported.data.dataset,
            dataset_name=f"{exported.data.dataset} at {experiment.data.image_size} pixels",
            dataset_split=exported.data.val.name,
            metric_type=name.removeprefix("val/"),
            metric_name=_meaning(name),
            metric_value=value,
        )
        for name, value in exported.metrics.items()
        if not name.endswith("_se")
    ]
    card = ModelCardData(
        license="unknown",  # the people who publish the weights choose it
        library_name="cvae-workflow",
        pipeline_tag=task,
        language="en" if is_captioned else None,
        datasets=[exported.data.dataset],
        tags=["variational-autoencoder", "pytorch", "safetensors", experiment.model.backbone],
        model_name=exported.name if results else None,
        eval_results=results or None,
    )
    return str(card.to_yaml())


def _meaning(name: str) -> str:
    metric = metrics.find(name)
    return name if metric is None else metric.description()
