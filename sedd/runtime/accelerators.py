"""Peak rates and sizes of accelerators, as their makers state them, by JAX's name (`device.device_kind`)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak numbers of one JAX device: a chip, or half of a chip that is two devices."""

    flops: float  # dense bfloat16 with float32 accumulation, per second; data sheets often print the sparse rate
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes per second
    links: float  # to other chips of its slice or machine, bytes per second in one direction, all links together


# TPUs: the pages "TPU v3", "TPU v4", ... of Google Cloud's documentation, cloud.google.com/tpu/docs/v6e and its
# neighbours, which give links in both directions (v3's: four of 656 Gbit/s, Jouppi et al., CACM 63(7), 2020). A chip of
# v3 and 7x is two devices. JAX has two names for some, as in jax/_src/pallas/mosaic/tpu_info.py.
_V5E = Chip(197e12, 16e9, 819e9, 200e9)
_V5P = Chip(459e12, 95e9, 2765e9, 600e9)
_V6E = Chip(918e12, 32e9, 1600e9, 400e9)
_TPUS = {
    "TPU v3": Chip(123e12 / 2, 32e9 / 2, 900e9 / 2, 328e9 / 2),
    "TPU v4": Chip(275e12, 32e9, 1200e9, 300e9),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": Chip(2307e12 / 2, 192e9 / 2, 7380e9 / 2, 600e9 / 2),
}

# GPUs: NVIDIA's data sheets of each product; of those that print only sparse numbers, half. Links: NVLink, one way, or
# PCI Express where there is none (4.0: 32 GB a second, 5.0: 64).
_GPUS = {
    "NVIDIA A10": Chip(125e12, 24e9, 600e9, 32e9),
    "NVIDIA A10G": Chip(70e12, 24e9, 600e9, 32e9),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 40e9, 1555e9, 32e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 300e9),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80e9, 1935e9, 32e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 300e9),
    "NVIDIA L4": Chip(121e12, 24e9, 300e9, 32e9),
    "NVIDIA L40": Chip(181e12, 48e9, 864e9, 32e9),
    "NVIDIA L40S": Chip(362e12, 48e9, 864e9, 32e9),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9, 2000e9, 64e9),
    "NVIDIA H100 NVL": Chip(835e12, 94e9, 3900e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9),
    "NVIDIA H200 NVL": Chip(835e12, 141e9, 4800e9, 450e9),
    "NVIDIA GH200 480GB": Chip(989e12, 96e9, 4000e9, 450e9),
    "NVIDIA B200": Chip(2250e12, 180e9, 7700e9, 900e9),
    "NVIDIA GB200": Chip(2500e12, 186e9, 8000e9, 900e9),
    "NVIDIA RTX A6000": Chip(155e12, 48e9, 768e9, 32e9),  # the GA102 architecture's white paper
    "NVIDIA GeForce RTX 3090": Chip(71e12, 24e9, 936e9, 32e9),  # likewise
    "NVIDIA GeForce RTX 4090": Chip(165e12, 24e9, 1008e9, 32e9),  # the Ada architecture's white paper
}
# Looked up by the full name: a custom A100 or a slice of an H100 has other numbers.
CHIPS = _TPUS | _GPUS


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOPs per second of a device; None if the device is not known."""
    chip = CHIPS.get(device_kind)
    return None if chip is None else chip.flops
