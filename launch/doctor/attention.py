"""Which attention kernel a run will take here, and what the others would bring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .findings import Finding, error, ok, warning

if TYPE_CHECKING:
    from ..config import RunConfig

LONG = 65536
"""Tokens of the problem that is asked about where no config says."""
HEADS = (32, 8, 128)
"""Query heads, key/value heads and their width, where no config says: Llama-3-8B's."""
PACKAGES = {"fa4": "flash-attn-4", "fa3": "flash-attn-3", "fa2": "flash-attn"}


@dataclass(frozen=True)
class Problem:
    """Attention as a config has it.

    Attributes:
        heads: Query heads of a rank.
        kv_heads: Key/value heads of a rank.
        width: Of a head.
        length: Tokens of a sequence.
        windows: Of its kinds of layers; None is a layer without.
        softcap: Of the scores, if there is one.
        precision: `bf16` or `float32`.
    """

    heads: int = HEADS[0]
    kv_heads: int = HEADS[1]
    width: int = HEADS[2]
    length: int = LONG
    windows: tuple[int | None, ...] = (None,)
    softcap: float | None = None
    precision: str = "bf16"

    @classmethod
    def of(cls, config: RunConfig, hf_config: Any) -> Problem:
        """Of a config and its architecture."""
        heads = hf_config.num_attention_heads
        kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
        width = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        degree = config.parallel.ulysses_degree
        ranks = degree if isinstance(degree, int) else 1
        window = getattr(hf_config, "sliding_window", None)
        kinds = set(getattr(hf_config, "layer_types", None) or ["sliding_attention"])
        windows = {window if kind == "sliding_attention" else None for kind in kinds}
        length = config.sequence.length
        return cls(
            max(1, kv_heads // ranks) * (heads // kv_heads),
            max(1, kv_heads // ranks),
            width,
            length if isinstance(length, int) else LONG,
            tuple(sorted(windows, key=lambda one: (one is not None, one))),
            getattr(hf_config, "attn_logit_softcapping", None),
            config.train.precision,
        )


@dataclass(frozen=True)
class Chosen:
    """What was chosen for one kind of layer and of sequence: its name, and why not the faster ones."""

    what: str
    kernel: str
    why: str


@dataclass(frozen=True)
class Attention:
    """Facts.

    Attributes:
        generation: First number of the GPU's compute capability; None on a CPU.
        chosen: For one document, and for packed ones, of each kind of layer.
        versions: Of the packages that are installed.
        broken: What importing them said, of those that cannot be.
    """

    generation: int | None
    chosen: tuple[Chosen, ...]
    versions: dict[str, str]
    broken: dict[str, str]


def read_attention(problem: Problem, has_gpu: bool) -> Attention:
    """Asks the library itself, by tensors that take no memory."""
    import torch

    from ...distributed.attention import choose_kernel
    from ...distributed.attention_kernels import AttentionOptions, Documents, installed_version

    device = torch.device("cuda" if has_gpu else "cpu")
    dtype = torch.bfloat16 if problem.precision == "bf16" else torch.float32
    one = torch.empty(1, dtype=dtype, device=device)
    shape = (problem.length, problem.width)
    query, key = (one.expand(1, heads, *shape) for heads in (problem.heads, problem.kv_heads))
    half = problem.length // 2
    kinds = {"a single document": Documents.whole(problem.length)}
    if half:
        kinds["packed documents"] = Documents((0, half, problem.length), problem.length - half)
    chosen = []
    for window in problem.windows:
        options = AttentionOptions(problem.width**-0.5, window, problem.softcap)
        layer = "" if window is None else f", window of {window:,}"
        for what, documents in kinds.items():
            chosen.append(Chosen(what + layer, *choose_kernel(query, key, options, documents)))
    versions = {name: version for name in PACKAGES.values() if (version := installed_version(name))}
    generation = torch.cuda.get_device_capability(device)[0] if has_gpu else None
    return Attention(generation, tuple(chosen), versions, _broken(versions) if has_gpu else {})


def _broken(versions: dict[str, str]) -> dict[str, str]:
    """Of the packages that are there, those that cannot be imported: a run would stop in its first step."""
    from ...distributed import flash_attention_2, flash_attention_3, flash_attention_4

    imports = {
        "flash-attn-4": flash_attention_4._interface,
        "flash-attn-3": flash_attention_3._operators,
        "flash-attn": flash_attention_2._interface,
    }
    found = {}
    for name in versions:
        try:
            imports[name]()
        except ImportError as refused:
            found[name] = str(refused)
    return found


def check_attention(facts: Attention) -> list[Finding]:
    """A line for each kernel that is taken, and one for each package that is broken."""
    findings = [error(message, "") for message in facts.broken.values()]
    by_kernel: dict[str, list[Chosen]] = {}
    for chosen in facts.chosen:
        by_kernel.setdefault(chosen.kernel, []).append(chosen)
    for kernel, of_kernel in by_kernel.items():
        what = " and ".join(one.what for one in of_kernel)
        line = f"attention of {what}: {kernel}"
        if facts.versions.get(PACKAGES.get(kernel, ""), ""):
            line += f" {facts.versions[PACKAGES[kernel]]}"
        findings.append(_judge(line, kernel, of_kernel[0].why, facts.generation))
    return findings


def _judge(line: str, kernel: str, why: str, generation: int | None) -> Finding:
    if generation is None:
        return ok(f"{line} (the CPU's)" if kernel == "cpu" else f"{line}, in plain PyTorch")
    if kernel == "blockwise":
        return warning(
            f"{line}, plain PyTorch: right, and many times slower than a fused kernel ({why})",
            "The reasons name what would do; train.precision=bf16 is asked for by all of them.",
        )
    if kernel == "flash" and generation in (9, 10, 11):
        package = "flash-attn-4" if "not fa4: it is not installed" in why else None
        package = package or ("flash-attn-3" if "not fa3: it is not installed" in why else None)
        if package is not None:
            return warning(
                f"{line}, which was written for older GPUs ({why})",
                _install(package),
            )
    if kernel == "cudnn" and "not fa4: it is not installed" in why:
        # benchmarks/results/decoder.md
        return ok(
            f"{line} ({why})",
            "With flash-attn-4, Llama-3-8B at 65,536 tokens ran 7 % faster on an H200: "
            f"{_install('flash-attn-4')}",
        )
    return ok(f"{line} ({why})")


def _install(package: str) -> str:
    if package == "flash-attn-3":
        return "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130."
    return "pip install 'longseq[fa4]'."
