"""Where a model runs, and its number format."""

from __future__ import annotations

import torch

from foveate.errors import FoveateError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device() -> str:
    """`cuda` if available, else `mps`, else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_dtype(device: str) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs that multiply it, float16 on MPS and on older GPUs, else float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind == "mps":
        return torch.float16
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("amx_tile") or has.get("avx512_bf16") else torch.float32


def usable_device(device: str | None) -> str:
    """The device asked for, or the best available. Raises `FoveateError` if it cannot be used."""
    device = device or choose_device()
    if device.partition(":")[0] not in ("cuda", "mps", "cpu"):
        raise FoveateError(f"unknown device {device!r}: choose cuda, mps or cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FoveateError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def usable_dtype(dtype: str | torch.dtype | None, device: str) -> torch.dtype:
    """The number format asked for, or the one that suits the device. Raises `FoveateError` for others."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return choose_dtype(device)
    if dtype not in DTYPES:
        raise FoveateError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_bfloat16(device: torch.device) -> None:
    """Raises `FoveateError` for a device on which bfloat16 is no faster than float32."""
    if choose_dtype(str(device)) is not torch.bfloat16:
        raise FoveateError(f"{device_name(device)} does not multiply bfloat16 here: leave out --bf16")


def device_name(device: torch.device) -> str:
    """Its kind, or what a GPU is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
