"""The kernels of `kernels/`: compiled once on the machine that runs them, called with the addresses of tensors.

Decoding on a CPU is many small steps. PyTorch takes longer to begin an operation than a token's share of it takes to
run, and multiplies a few rows by an expert's weights far slower than memory delivers these. What an operation is, its
module in `ops` says in PyTorch; each has a kernel here that does the same in one go, for BF16 and for inference.

No compiler, no kernels: everything then runs in PyTorch. `DSV3_NATIVE=0` in the environment wants that too.

Shapes: T tokens, H heads, D width, E experts, N rows, F expert width; others where they occur.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.latents import Latents

_SOURCES = Path(__file__).with_name("kernels")
_FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-march=native")


class Map(ctypes.Structure):
    """A linear map's weight for the kernels of a block; whoever makes it keeps the tensors."""

    _fields_ = (("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p))


_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "m": Map}
_ARGUMENTS = {  # of each kernel: pointers, integers, floats, maps
    "rms_norm": "pippiif",
    "rotate": "piipppiii",
    "linear": "pippiiii",
    "linear_int8": "pipppiiii",
    "select_experts": "ppppiiiiiiif",
    "experts": "pppppppiiii",
    "experts_int8": "pppppppppiiii",
    "block_before": "ppmpmmpfpppppiiiiiiii",
    "block_between": "pmppfpppppppiiiiiiiiiifi",
    "block_after": "ppppmmmmpppiiiiiii",
    "latent_attention": "piipiipipppfpppiiiiiiiii",
}
_STEP = 32  # inputs that a dot product takes at a time
_TILE = 4  # outputs that are computed at a time
_MAX_EXPERTS = 1024


def usable(*tensors: Tensor) -> bool:
    """Whether kernels may take these: BF16 on a CPU, in inference, and a library that could be built.

    Inference mode and not just no gradients: a backward pass that makes something again must get the forward's bits.
    """
    if not torch.is_inference_mode_enabled():
        return False
    for x in tensors:
        if x.dtype is not torch.bfloat16 or not x.is_cpu:
            return False
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built if this machine has not built them yet; None where they cannot be."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if os.environ.get("DSV3_NATIVE") == "0" or compiler is None or platform.system() != "Linux":
        return None
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user whom the system does not know, without HOME
        return None
    made_of = [path.read_bytes() for path in sorted(_SOURCES.iterdir())] + [repr((compiler, _FLAGS, _cpu())).encode()]
    key = hashlib.sha256(b"".join(made_of)).hexdigest()[:16]
    path = Path(home) / "dsv3" / f"native-{key}.so"
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _build(compiler, path)
        if not (_is_ours(path.parent) and _is_ours(path)):
            return None
        found = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, kinds in _ARGUMENTS.items():
        kernel = found[name]
        kernel.restype, kernel.argtypes = None, [_TYPES[kind] for kind in kinds]
        setattr(found, name, kernel)
    return found


def loaded() -> ctypes.CDLL:
    """The library, where something has said that there is one."""
    found = library()
    assert found is not None
    return found


def _build(compiler: str, path: Path) -> None:
    # Beside its place and renamed: of several processes that build at once, one wins and none reads half a file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *_FLAGS, str(_SOURCES / "kernels.cpp"), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        built.chmod(0o700)
        os.replace(built, path)


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have put it there: what it holds will be run."""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _cpu() -> str:
    """What decides which instructions there are: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """`ops.rms_norm.reference_rms_norm`, or None if the kernel does not take these."""
    D = x.shape[-1]
    if not usable(x, weight) or D % 16 or x.stride(-1) != 1:
        return None
    rows = x.reshape(-1, D)  # of a slice: a view, its rows further apart
    out = x.new_empty(x.shape)
    loaded().rms_norm(rows.data_ptr(), rows.stride(0), weight.data_ptr(), out.data_ptr(), len(rows), D, eps)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """`model.rope.rotate` for x [1, T, R] or [1, T, H, R], cos and sin of T tokens in FP32; None if it is not so."""
    if not usable(x) or x.shape[0] != 1 or x.stride(-1) != 1 or not (cos.is_contiguous() and sin.is_contiguous()):
        return None
    T, R = x.shape[1], x.shape[-1]
    if cos.numel() != T * R // 2 or cos.dtype != torch.float32:
        return None
    H = x.shape[2] if x.dim() == 4 else 1
    out = x.new_empty(x.shape)
    apart = x.stride(1), x.stride(2) if x.dim() == 4 else 0
    loaded().rotate(x.data_ptr(), *apart, cos.data_ptr(), sin.data_ptr(), out.data_ptr(), T, H, R)
    return out


def linear(x_NI: Tensor, weight_OI: Tensor, scale_O: Tensor | None = None) -> Tensor | None:
    """x W^T, [N, O], or None if the kernel does not take these. An int8 weight has a scale, FP32, for each output."""
    if not (usable(x_NI) and takes_linear(weight_OI)) or x_NI.stride(1) != 1:
        return None
    num_outputs, num_inputs = weight_OI.shape
    out = x_NI.new_empty(len(x_NI), num_outputs)
    x, sizes = (x_NI.data_ptr(), x_NI.stride(0)), (len(x_NI), num_inputs, num_outputs, torch.get_num_threads())
    if scale_O is None:
        loaded().linear(*x, weight_OI.data_ptr(), out.data_ptr(), *sizes)
    else:
        loaded().linear_int8(*x, weight_OI.data_ptr(), scale_O.data_ptr(), out.data_ptr(), *sizes)
    return out


def takes_linear(weight_OI: Tensor) -> bool:
    """Whether there is a kernel for maps with such weights, BF16 or int8."""
    num_outputs, num_inputs = weight_OI.shape
    return _takes_weights(weight_OI) and not (num_inputs % _STEP or num_outputs % _TILE)


def _takes_weights(weight: Tensor) -> bool:
    if weight.dtype not in (torch.bfloat16, torch.int8) or not weight.is_cpu or not weight.is_contiguous():
        return False
    return library() is not None


def select_experts(
    scores_TE: Tensor,
    bias_E: Tensor | None,
    *,
    chosen: int,
    groups: int,
    kept_groups: int,
    pairs: bool,
    normalised: bool,
    factor: float,
) -> tuple[Tensor, Tensor] | None:
    """`model.router.select_experts` of scores in FP32: (ids [T, K], weights [T, K]); or None if it is not so.

    groups: 1 for no choice of groups; else the `kept_groups` best by their two best experts (`pairs`) or their best.
    """
    T, E = scores_TE.shape
    if not (torch.is_inference_mode_enabled() and scores_TE.is_cpu and scores_TE.dtype == torch.float32):
        return None
    if E > _MAX_EXPERTS or not scores_TE.is_contiguous() or library() is None:
        return None
    ids_TK, weights_TK = scores_TE.new_empty(T, chosen, dtype=torch.int64), scores_TE.new_empty(T, chosen)
    if bias_E is not None and not (bias_E.dtype == torch.float32 and bias_E.is_contiguous()):
        return None
    bias = None if bias_E is None else bias_E.data_ptr()
    loaded().select_experts(
        *(scores_TE.data_ptr(), bias, ids_TK.data_ptr(), weights_TK.data_ptr()),
        *(T, E, chosen, groups, kept_groups, pairs, normalised, factor),
    )
    return ids_TK, weights_TK


def experts(
    x_ND: Tensor,
    weights_N: Tensor,
    counts_E: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """`ops.experts.reference_grouped_swiglu`, or None if the kernel does not take these.

    scales: of int8 weights, FP32, [E, G] and [E, D].
    """
    E, D, F = down_EDF.shape
    if not (usable(x_ND) and takes_experts(down_EDF)):
        return None
    x_ND, weights_N, counts_E = x_ND.contiguous(), weights_N.float().contiguous(), counts_E.contiguous()
    out, act = torch.empty_like(x_ND), x_ND.new_empty(len(x_ND), F)
    rows, sizes = (x_ND, weights_N, counts_E), (E, D, F, torch.get_num_threads())
    if scales is None:
        loaded().experts(*(x.data_ptr() for x in (*rows, gate_up_EGD, down_EDF, out, act)), *sizes)
    else:
        maps = (gate_up_EGD, scales[0], down_EDF, scales[1])
        loaded().experts_int8(*(x.data_ptr() for x in (*rows, *maps, out, act)), *sizes)
    return out


def takes_experts(down_EDF: Tensor) -> bool:
    """Whether there is a kernel for experts with such weights, BF16 or int8."""
    return _takes_weights(down_EDF) and not any(size % _STEP for size in down_EDF.shape[1:])


def takes_block(latent_width: int, rope_width: int, hidden_width: int, num_experts: int) -> bool:
    """Whether the kernels of a block take these sizes; of its maps `takes_linear` and `takes_experts` say it."""
    return not any(width % _STEP for width in (latent_width, rope_width, hidden_width)) and num_experts <= _MAX_EXPERTS


def latent_attention(
    q_nope_BSHN: Tensor,
    q_rope_BSHR: Tensor,
    latents: Latents,
    up_HMC: Tensor,
    scale: float,
    mask: Tensor | None,
) -> Tensor | None:
    """`ops.attention.absorbed_attention`, or None if the kernel does not take these. Copies no latent."""
    (B, S, H, N), T, R = q_nope_BSHN.shape, latents.shape[1], q_rope_BSHR.shape[-1]
    V, C = up_HMC.shape[1] - N, up_HMC.shape[2]
    if not usable(q_nope_BSHN, q_rope_BSHR, latents.rows, up_HMC) or C % _STEP or R % _STEP or V % _TILE:
        return None
    if latents.rows.stride()[-2:] != (C + R, 1) or not up_HMC.is_contiguous():
        return None
    nope, rope = q_nope_BSHN.flatten(0, 1), q_rope_BSHR.flatten(0, 1)
    apart = 0 if latents.slots_BT is not None else latents.rows.stride(0)
    slots = None if latents.slots_BT is None else latents.slots_BT.contiguous()
    looks = None if mask is None else mask.expand(B, 1, S, T).contiguous()
    threads = torch.get_num_threads()
    out = nope.new_empty(B, S, H, V)
    queries = nope.new_empty(B * S, H, C + R)
    scratch = nope.new_empty(threads * 8 * C, dtype=torch.float32)
    loaded().latent_attention(
        *(nope.data_ptr(), *nope.stride()[:2], rope.data_ptr(), *rope.stride()[:2]),
        *(latents.rows.data_ptr(), apart, None if slots is None else slots.data_ptr()),
        *(up_HMC.data_ptr(), None if looks is None else looks.data_ptr(), scale),
        *(out.data_ptr(), queries.data_ptr(), scratch.data_ptr(), B, S, T, H, N, C, R, V, threads),
    )
    return out
