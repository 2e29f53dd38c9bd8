"""Each precision beside fp32: the arithmetic itself, fifty steps of training, and compiled code."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cvae.distributed.ranks import Ranks, connect
from cvae.errors import UserError
from tests.gpu_check.curves import curve, deviation
from tests.gpu_check.findings import Finding, judged, measured, skipped
from tests.gpu_check.setting import Setting, allow_fp16_on_a_cpu

_STEPS = 50
# Half the distance of two neighbouring numbers at 1: what one rounding may change.
_ROUNDING = {"tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}
# Largest deviation of the loss over 50 steps that counts as the same curve: some ten roundings. The tiny models
# on a CPU in bf16 come to 1.3e-3.
_LIMIT = {"tf32": 5e-3, "bf16": 2e-2, "fp16": 5e-3}
_DTYPE = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def arithmetic(setting: Setting) -> Iterator[Finding]:
    """Products and convolutions under each precision's settings, beside fp64 on the CPU."""
    # fp32 last as well as first: the settings of another precision must not remain.
    with connect() as ranks:
        for name in [*setting.precisions(), "fp32"]:
            if name in ("bf16", "fp16"):
                continue
            curve(setting.experiment("conv", precision=name), ranks, 1)
            for kind, off in _errors(ranks.device).items():
                is_tf32 = name == "tf32"
                # With TF32 allowed cuDNN may still choose a kernel without it; cuBLAS does not.
                low = 3e-5 if is_tf32 and "product" in kind else 0.0
                high = 5e-3 if is_tf32 else 3e-5
                yield judged(
                    f"{kind} in {name}",
                    low <= off <= high,
                    f"{off:.1e} from fp64",
                    f"{low:.0e} to {high:.0e}: TF32, of ten bits, gives some 3e-4",
                    deviation=off,
                )
    if reason := setting.why_not("tf32"):
        yield skipped("tf32", reason)


def _errors(device: torch.device) -> dict[str, float]:
    """Root mean square errors, relative to the results' own."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
    maps = torch.randn(16, 128, 32, 32, generator=generator)
    kernel = torch.randn(128, 128, 3, 3, generator=generator)

    def off(found: Tensor, exact: Tensor) -> float:
        difference = found.cpu().double() - exact
        return float(difference.square().mean().sqrt() / exact.square().mean().sqrt())

    product = left.to(device) @ right.to(device).T
    convolved = nn.functional.conv2d(maps.to(device), kernel.to(device), padding=1)
    exact = nn.functional.conv2d(maps.double(), kernel.double(), padding=1)
    return {
        "a matrix product": off(product, left.double() @ right.double().T),
        "a 3×3 convolution": off(convolved, exact),
    }


def losses(setting: Setting, backbone: str) -> Iterator[Finding]:
    """50 steps in every precision beside 50 in fp32, from the same weights and on the same batches."""
    names = setting.precisions()
    if not setting.has_gpu:
        allow_fp16_on_a_cpu()
        names.append("fp16")
    with connect() as ranks:
        found: dict[str, Any] = {}
        for name in [*names, "fp32 again"]:
            precision = name.removesuffix(" again")
            experiment = setting.experiment(backbone, precision=precision)
            scale = _scale_that_fits(experiment, ranks) if precision == "fp16" else None
            dtypes: list[torch.dtype] = []

            def begin(
                engine: Any, seen: list[torch.dtype] = dtypes, scale: float | None = scale
            ) -> None:
                _watch(engine.eval_model, seen)
                if scale is not None:
                    state = engine.scaler.state_dict()
                    engine.scaler.load_state_dict({**state, "scale": scale})

            found[name] = curve(experiment, ranks, _STEPS, begin)
            if precision != name:
                continue
            engine = found[name].engine
            yield judged(
                f"{precision} is what computes",
                engine.precision == precision and dtypes[:1] == [_DTYPE[precision]],
                f"engine {engine.precision}, first layer gives {str(dtypes[0])[6:]}",
                f"{precision}, {str(_DTYPE[precision])[6:]}",
            )
            skipped_updates = sum(not math.isfinite(norm) for norm in found[name].norms)
            yield judged(
                f"{precision}: every step is an update",
                skipped_updates == 0,
                f"{skipped_updates} of {_STEPS} gradients not finite",
                "none" if scale is None else f"none at a loss scale of 2^{math.log2(scale):.0f}",
            )
            found[name] = found[name]._replace(engine=None)
        reference = found["fp32"].losses
        yield judged(
            "fp32: it learns",
            reference[-1] < reference[0],
            f"{reference[0]:.1f} to {reference[-1]:.1f} nats",
            f"lower after {_STEPS} steps",
            first=reference[0],
            last=reference[-1],
        )
        again = deviation(reference, found["fp32 again"].losses)
        yield judged(
            "fp32 twice",
            again <= 1e-4,
            f"{again:.1e} apart",
            "at most 1e-4: only the order of sums may differ",
            deviation=again,
        )
        for name in names[1:]:
            off = deviation(reference, found[name].losses)
            least = _ROUNDING[name] / 1000
            yield judged(
                f"{name} beside fp32",
                least < off <= _LIMIT[name],
                f"{off:.1e} at most, {found[name].losses[-1]:.1f} nats at last",
                f"{least:.0e} to {_LIMIT[name]:.0e}: less would be fp32 itself; more than rounding gives",
                deviation=off,
                step_s=found[name].step_s,
            )
    for name in ("tf32", "bf16", "fp16"):
        if name not in names:
            yield skipped(name, setting.why_not(name) or "")


def _scale_that_fits(experiment: Any, ranks: Ranks) -> float:
    """Returns a loss scale at which no update overflows.

    At the first one, 2^16, some do: they are left out, and the curve falls behind that of fp32 by as many steps.
    """
    return float(curve(experiment, ranks, 20).engine.scaler.get_scale()) / 4


def _watch(model: nn.Module, seen: list[torch.dtype]) -> None:
    """Notes the dtype of each output of the first layer that multiplies."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    layers[0].register_forward_hook(lambda _layer, _inputs, output: seen.append(output.dtype))


def compiled(setting: Setting) -> Iterator[Finding]:
    """training.compile: the same curve, another pace."""
    with connect() as ranks:
        for backbone, precision in [("conv", "fp32"), ("resnet", "auto")][
            : 1 if setting.small else 2
        ]:
            options: dict[str, Any] = {"precision": precision}
            eager = curve(setting.experiment(backbone, **options), ranks, _STEPS)
            try:
                fused = curve(setting.experiment(backbone, compile=True, **options), ranks, _STEPS)
            except UserError as error:
                yield skipped(f"{backbone}, {precision}", str(error))
                continue
            name = eager.engine.precision
            limit = 1e-4 if name == "fp32" else _LIMIT[name]
            off = deviation(eager.losses, fused.losses)
            yield judged(
                f"{backbone}, {name}: compiled beside not",
                off <= limit,
                f"{off:.1e} apart",
                f"at most {limit:.0e}: the order of sums and roundings may differ",
                deviation=off,
            )
            yield measured(
                f"{backbone}, {name}: a compiled step",
                f"{1e3 * fused.step_s:.2f} ms after {fused.settling_s:.0f} s of compiling",
                f"{1e3 * eager.step_s:.2f} ms without",
                compiled_s=fused.step_s,
                eager_s=eager.step_s,
                compiling_s=fused.settling_s,
            )
