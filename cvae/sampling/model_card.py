"""The README.md of an exported model: a model card (Mitchell et al. 2019) in the Hugging Face hub's form."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from cvae.config.experiment import Experiment
from cvae.metrics import find
from cvae.models.cvae import Cvae
from cvae.sampling.export_format import SAMPLES, DataFacts, ExportedModel, SplitFacts

_SOURCES = {
    "coco": "Photographs and captions of [MS COCO 2017](https://cocodataset.org) (Lin et al. 2014). The"
    " photographs come from Flickr, each under its owner's Creative Commons licence, some of which exclude"
    " commercial use; the captions are CC BY 4.0. Whether a model trained on them may be used as you intend"
    " is for you to judge.",
    "fashion_mnist": "[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (Xiao et al. 2017),"
    " MIT licence.",
    "scenes": "Scenes of coloured shapes with captions, drawn by this project's `prepare.py scenes`; no"
    " photographs, no people.",
}
_LIKELIHOODS = {
    "bernoulli": "Bernoulli (binary cross-entropy, summed)",
    "gaussian": "Gaussian of fixed variance (squared error, summed)",
    "optimal_gaussian": "Gaussian of the optimal variance (σ-VAE)",
}


def model_card(
    exported: ExportedModel, experiment: Experiment, model: Cvae, prompts: Sequence[str]
) -> str:
    """Markdown behind the hub's YAML front matter. prompts: examples of what the model draws."""
    sections = [
        f"# {exported.name}",
        _summary(exported, experiment),
        f"![Samples]({SAMPLES})",
        "## Use",
        _use(exported, experiment, prompts),
        "## The model",
        _architecture(exported, experiment, model),
        "## Training data",
        _data(exported.data, experiment),
        "## Metrics",
        _metrics(exported),
        "## Training",
        _training(experiment),
        "## Limits",
        _limits(exported, experiment),
        "## Provenance",
        _provenance(exported),
    ]
    return f"---\n{_front_matter(exported, experiment)}---\n\n" + "\n\n".join(sections) + "\n"


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
            metric_type=key.removeprefix("val/"),
            metric_name=_described(key),
            metric_value=value,
        )
        for key, value in exported.metrics.items()
        if not key.endswith("_se")
    ]
    card = ModelCardData(
        # The people who publish the weights choose it.
        license="unknown",
        library_name="cvae-workflow",
        pipeline_tag=task,
        language="en" if is_captioned else None,
        datasets=[exported.data.dataset],
        tags=["variational-autoencoder", "pytorch", "safetensors", experiment.model.backbone],
        model_name=exported.name if results else None,
        eval_results=results or None,
    )
    return f"{card.to_yaml()}\n"


def _summary(exported: ExportedModel, experiment: Experiment) -> str:
    drawn_from = {
        "text": "It draws images from English captions.",
        "label": f"It draws images of {len(exported.classes)} classes: {', '.join(exported.classes)}.",
        "none": "It draws images without being told what.",
    }[experiment.model.condition]
    channels, height, width = exported.image_shape
    colour = "RGB" if channels == 3 else "grey"
    kind = "variational autoencoder (VAE)"
    if experiment.model.condition != "none":
        kind = "conditional variational autoencoder (CVAE)"
    return (
        f"A {kind} for {colour} images of {width}×{height} pixels,"
        f" trained on `{exported.data.dataset}`. {drawn_from}"
    )


def _use(exported: ExportedModel, experiment: Experiment, prompts: Sequence[str]) -> str:
    asked = json.dumps(list(prompts[:1]), ensure_ascii=False) if prompts else "None"
    quoted = "".join(f" {shlex.quote(prompt)}" for prompt in prompts)
    needs = ["torch", "numpy", "safetensors", "pydantic", "pyyaml", "pillow", "matplotlib", "tqdm"]
    needs += ["transformers"] if exported.text_encoder else []
    needs += ["diffusers"] if experiment.model.backbone == "ldm" else []
    included = ", the text encoder included" if exported.text_encoder else ""
    command = (
        f"On the command line, in a checkout of cvae-workflow:\n\n"
        f"    python workflows/generate.py FOLDER{quoted} -n 8\n\n"
        if prompts
        else ""
    )
    return (
        f"{command}In Python:\n\n"
        "    from cvae.sampling import load\n\n"
        '    model = load("FOLDER")\n'
        f"    images = model.draw({asked}, 8)  # uint8 {_shape(exported)}\n\n"
        f"FOLDER is the folder of this file. It holds all that drawing takes{included}; no network, MLflow,"
        " SLURM or Ray is needed. Where cvae-workflow is not installed:\n\n"
        f"    pip install {' '.join(needs)}\n"
        "    pip install --no-deps CHECKOUT\n\n"
        "Every file is checked against its sha256 in `config.json` when the model is loaded (all but this"
        " one, which you may edit). There are no pickles."
    )


def _shape(exported: ExportedModel) -> str:
    return f"(1, 8, {', '.join(map(str, exported.image_shape))})"


def _architecture(exported: ExportedModel, experiment: Experiment, model: Cvae) -> str:
    settings, encoder = experiment.model, exported.text_encoder
    latent = " × ".join(map(str, model.latent_shape))
    spatial = f" ({math.prod(model.latent_shape):,} numbers)" if len(model.latent_shape) > 1 else ""
    rows = [
        ("backbone", f"`{settings.backbone}`"),
        ("parameters", f"{model.n_parameters():,}"),
        ("latent z", f"{latent}{spatial}"),
        ("prior", "N(0, I)" if settings.prior == "standard" else "learned from the text, p(z\\|c)"),
        ("likelihood", _LIKELIHOODS[settings.likelihood]),
        ("β", f"{settings.beta:g}"),
    ]
    if settings.condition != "none":
        rows.insert(2, ("condition", f"{settings.condition}, fused by `{settings.fusion}`"))
    if encoder is not None:
        entry = encoder.entry
        revision = f", revision {entry.revision}" if entry.revision else ""
        rows += [
            (
                "text encoder",
                f"`{Path(encoder.name).name}`{revision}, frozen, in `text_encoder/`; {entry.pooling} of"
                f" the last hidden states ({entry.dim}); at most {entry.max_tokens} tokens",
            ),
            ("… its weights", f"sha256 `{entry.hash}`; under their own licence"),
        ]
    if settings.init_from is not None:
        rows.append(("began as", f"`{settings.init_from}`"))
    return _table(("", ""), rows)


def _data(data: DataFacts, experiment: Experiment) -> str:
    def row(what: str, split: SplitFacts, used: int) -> tuple[str, ...]:
        captions = f"{split.captions:,}" if split.captions else "–"
        return (what, f"`{split.name}`", f"{used:,}", captions, f"{split.skipped:,}")

    header = ("", "split", "images", "captions of the split", "skipped files")
    rows = [
        row("trained on", data.train, data.trained_on),
        row("evaluated on", data.val, data.val.images),
    ]
    share = ""
    if data.trained_on < data.train.images:
        share = (
            f"\n\nTrained on {experiment.data.fraction:.4g} of the split's {data.train.images:,} images"
            f" (data.fraction, chosen by seed {experiment.seed})."
        )
    known = _SOURCES.get(data.dataset, f"`{data.dataset}`.")
    return (
        f"{known}\n\n{_table(header, rows)}{share}\n\nPrepared at {experiment.data.image_size}×"
        f"{experiment.data.image_size} pixels. Digest of the prepared files: `{data.digest}`."
    )


def _metrics(exported: ExportedModel) -> str:
    if not exported.metrics:
        return f"None were measured at step {exported.step:,}, from which the weights are."
    errors = {key: value for key, value in exported.metrics.items() if key.endswith("_se")}
    rows = [
        (
            _described(key),
            f"{value:.4g}" + (f" ± {errors[key + '_se']:.2g}" if key + "_se" in errors else ""),
        )
        for key, value in exported.metrics.items()
        if key not in errors
    ]
    return (
        f"Of the weights here, those of step {exported.step:,}, on `{exported.data.val.name}`"
        f" ({exported.data.val.images:,} images)"
        + ("; ± is one standard error" if errors else "")
        + f":\n\n{_table(('metric', 'value'), rows)}"
    )


def _described(metric: str) -> str:
    entry = find(metric)
    return metric if entry is None else entry.description()


def _training(experiment: Experiment) -> str:
    training, optimizer = experiment.training, experiment.optimizer
    most = f", at most {training.max_steps:,} steps" if training.max_steps else ""
    ema = f"; averaged weights, decay {training.ema_decay:g}" if training.ema_decay else ""
    name = "AdamW" if optimizer.weight_decay else "Adam"
    return (
        f"{name}, learning rate {optimizer.lr:g} ({optimizer.schedule}, {optimizer.warmup_steps} warm-up"
        f" steps), {training.global_batch_size} images a step, {training.epochs:g} epochs{most}, seed"
        f" {experiment.seed}{ema}. Loss:"
        " reconstruction loss + β·KL, without perceptual or adversarial terms. All settings are in"
        " `experiment.yaml`, with which `launch.py` repeats the run."
    )


def _limits(exported: ExportedModel, experiment: Experiment) -> str:
    _, height, width = exported.image_shape
    limits = [
        f"Samples are blurry: the model averages over what it is unsure of. They are {width}×{height} pixels.",
    ]
    if exported.text_encoder is not None:
        limits += [
            "A caption reaches the model as one pooled vector. It binds attributes to objects poorly: of “a"
            " red circle and a blue square” the colours may be swapped, and counts and places are vague.",
            f"Captions beyond {exported.text_encoder.entry.max_tokens} tokens are cut. Languages and words"
            " that the text encoder or the training captions lack draw something average.",
            "The text encoder has the biases of the text that it was trained on.",
        ]
    if exported.data.dataset == "coco":
        limits.append(
            "COCO shows mostly everyday scenes of North America and Europe, and its captions guess people's"
            " sex, age and occupation; drawings repeat such guesses. Faces and written words do not come out."
        )
    limits.append(
        "For research and teaching. Not for pictures that are taken for photographs of real people or"
        " events, nor for decisions about anybody."
    )
    return "\n".join(f"- {limit}" for limit in limits)


def _provenance(exported: ExportedModel) -> str:
    known = exported.provenance
    rows = []
    if known.commit is not None:
        dirty = ", with uncommitted changes" if known.uncommitted_changes else ""
        rows.append(("code", f"commit `{known.commit}`{dirty}"))
    packages = [f"{name} {version}" for name, version in known.packages.items() if version]
    if packages:
        rows.append(("packages", ", ".join(packages)))
    if known.world_size is not None:
        ranks = f"{known.world_size} rank{'s' * (known.world_size > 1)}"
        hosts = f"{known.hosts} host{'s' * ((known.hosts or 1) > 1)}"
        rows.append(("machines", f"{ranks} on {hosts}; {known.device}, {known.precision}"))
    rows += [("command", f"`{command}`") for command in known.commands]
    return _table(("", ""), rows) if rows else "The run's journal does not say."


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
