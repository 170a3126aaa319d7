"""Devices as a clock sees them: how fast they compute, read memory and disk, and talk to the server.

A `Device` holds rates that programs reach. The known ones come from data sheets: `DataSheet.device` multiplies the
peaks of a sheet by efficiencies that stand beside them. Rates of disk and network depend on more than the device, so
these are assumptions for all of them, and say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, final

from pydantic import Field

from emberfed.errors import closest, one_of
from emberfed.sections import Section

_GB: Final = 10**9
_TERA: Final = 10**12
_MEGABIT: Final = 10**6 / 8


@final
class Device(Section):
    """What a client computes on; all rates are those that programs reach, not peaks.

    Attributes:
        name: Its name in tables and reports.
        flops_per_second: Matrix products; a multiply-add counts 2.
        memory_bytes_per_second: Reads and writes of the memory that weights are in.
        memory_bytes: Size of that memory.
        disk_bytes_per_second: Sequential reads.
        download_bytes_per_second: From the server.
        upload_bytes_per_second: To the server.
        source: Where the figures come from.
    """

    name: str = Field(pattern=r"^[\w.=-]+$")
    flops_per_second: float = Field(ge=1)
    memory_bytes_per_second: float = Field(ge=1)
    memory_bytes: int = Field(ge=1, le=2**63)
    disk_bytes_per_second: float = Field(ge=1)
    download_bytes_per_second: float = Field(ge=1)
    upload_bytes_per_second: float = Field(ge=1)
    source: str = "measured or chosen by whoever wrote the configuration"


@final
@dataclass(frozen=True, slots=True)
class DataSheet:
    """A known device: peaks from public sources, and what is assumed of them.

    Attributes:
        name: The device's name.
        title: Its name for people.
        peak_flops_per_second: Dense matrix products at `precision`.
        precision: Number format of that peak.
        flops_efficiency: Share of the peak that training is assumed to reach.
        peak_memory_bytes_per_second: Memory bandwidth.
        memory_efficiency: Share of it that is assumed to be reached.
        memory_bytes: Size of the memory.
        disk_bytes_per_second: Assumed.
        download_bytes_per_second: Assumed.
        upload_bytes_per_second: Assumed.
        source: Name of the document, and how the peak follows from it where it does not state it.
        url: Where it is.
    """

    name: str
    title: str
    peak_flops_per_second: float
    precision: str
    flops_efficiency: float
    peak_memory_bytes_per_second: float
    memory_efficiency: float
    memory_bytes: int
    disk_bytes_per_second: float
    download_bytes_per_second: float
    upload_bytes_per_second: float
    source: str
    url: str

    @property
    def device(self) -> Device:
        """The rates that are assumed to be reached."""
        return Device(
            name=self.name,
            flops_per_second=self.peak_flops_per_second * self.flops_efficiency,
            memory_bytes_per_second=self.peak_memory_bytes_per_second * self.memory_efficiency,
            memory_bytes=self.memory_bytes,
            disk_bytes_per_second=self.disk_bytes_per_second,
            download_bytes_per_second=self.download_bytes_per_second,
            upload_bytes_per_second=self.upload_bytes_per_second,
            source=f"{self.source} ({self.url}); disk and network assumed",
        )


_MOBILE: Final = {"download_bytes_per_second": 100 * _MEGABIT, "upload_bytes_per_second": 20 * _MEGABIT}
_HOME: Final = {"download_bytes_per_second": 200 * _MEGABIT, "upload_bytes_per_second": 50 * _MEGABIT}
_OFFICE: Final = {"download_bytes_per_second": 1000 * _MEGABIT, "upload_bytes_per_second": 1000 * _MEGABIT}
_DATA_CENTRE: Final = {"download_bytes_per_second": 10_000 * _MEGABIT, "upload_bytes_per_second": 10_000 * _MEGABIT}

_SHEETS: Final = (
    DataSheet(
        name="phone",
        title="Phone: Snapdragon 8 Gen 3, its CPU",
        peak_flops_per_second=355.2 * _GB,
        precision="float32",
        flops_efficiency=0.5,
        peak_memory_bytes_per_second=76.8 * _GB,
        memory_efficiency=0.7,
        memory_bytes=8 * _GB,
        disk_bytes_per_second=1.5 * _GB,
        **_MOBILE,
        source="Qualcomm Snapdragon 8 Gen 3 product brief: one Cortex-X4 at 3.3 GHz, five Cortex-A720 at 3.2 (three) "
        "and 3.0 GHz (two), LPDDR5X at 4800 MHz, 64 bit. Peak: 4 and 2 vector units of 128 bit for each, multiply-adds "
        "of 4 numbers per cycle; the two small cores left out. Memory size of a common model",
        url="https://www.qualcomm.com/products/mobile/snapdragon/smartphones/snapdragon-8-series-mobile-platforms/snapdragon-8-gen-3-mobile-platform",
    ),
    DataSheet(
        name="laptop_cpu",
        title="Laptop CPU: AMD Ryzen 7 7840U",
        peak_flops_per_second=844.8 * _GB,
        precision="float32",
        flops_efficiency=0.5,
        peak_memory_bytes_per_second=89.6 * _GB,
        memory_efficiency=0.7,
        memory_bytes=16 * _GB,
        disk_bytes_per_second=3 * _GB,
        **_HOME,
        source="AMD product page: 8 cores of Zen 4, base clock 3.3 GHz, two channels of DDR5-5600. Peak: two "
        "multiply-adds of 8 numbers per core and cycle at the base clock. Memory size of a common model",
        url="https://www.amd.com/en/products/processors/laptop/ryzen/7000-series/amd-ryzen-7-7840u.html",
    ),
    DataSheet(
        name="laptop_gpu",
        title="Laptop GPU: GeForce RTX 4060 Laptop",
        peak_flops_per_second=29.1 * _TERA,
        precision="bfloat16, sums in float32",
        flops_efficiency=0.3,
        peak_memory_bytes_per_second=256 * _GB,
        memory_efficiency=0.7,
        memory_bytes=8 * 2**30,
        disk_bytes_per_second=3 * _GB,
        **_HOME,
        source="NVIDIA's comparison of GeForce laptops: 3072 CUDA cores, boost clock up to 2370 MHz, 8 GB of GDDR6 at "
        "128 bit (16 Gbit/s a pin). Peak: 2 FLOP per core and cycle in float32, twice that on tensor cores as in the "
        "Ada whitepaper",
        url="https://www.nvidia.com/en-us/geforce/laptops/compare/",
    ),
    DataSheet(
        name="rtx4090",
        title="GeForce RTX 4090",
        peak_flops_per_second=165.2 * _TERA,
        precision="bfloat16, sums in float32",
        flops_efficiency=0.3,
        peak_memory_bytes_per_second=1008 * _GB,
        memory_efficiency=0.7,
        memory_bytes=24 * 2**30,
        disk_bytes_per_second=5 * _GB,
        **_OFFICE,
        source="NVIDIA Ada GPU Architecture whitepaper, appendix A",
        url="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
    DataSheet(
        name="l20",
        title="NVIDIA L20",
        peak_flops_per_second=119.5 * _TERA,
        precision="bfloat16, sums in float32",
        flops_efficiency=0.3,
        peak_memory_bytes_per_second=864 * _GB,
        memory_efficiency=0.7,
        memory_bytes=48 * 2**30,
        disk_bytes_per_second=5 * _GB,
        **_DATA_CENTRE,
        source="TechPowerUp GPU database, L20: 48 GB of GDDR6, 864 GB/s, 59.8 TFLOP/s in float32 (NVIDIA has no public "
        "data sheet). Peak: twice the float32 one, as in the Ada whitepaper",
        url="https://www.techpowerup.com/gpu-specs/l20.c4206",
    ),
    DataSheet(
        name="a100",
        title="NVIDIA A100 SXM, 80 GB",
        peak_flops_per_second=312 * _TERA,
        precision="bfloat16, sums in float32",
        flops_efficiency=0.3,
        peak_memory_bytes_per_second=2039 * _GB,
        memory_efficiency=0.7,
        memory_bytes=80 * 2**30,
        disk_bytes_per_second=5 * _GB,
        **_DATA_CENTRE,
        source="NVIDIA A100 Tensor Core GPU data sheet",
        url="https://www.nvidia.com/en-us/data-center/a100/",
    ),
    DataSheet(
        name="h100",
        title="NVIDIA H100 SXM",
        peak_flops_per_second=989.4 * _TERA,
        precision="bfloat16, sums in float32",
        flops_efficiency=0.3,
        peak_memory_bytes_per_second=3350 * _GB,
        memory_efficiency=0.7,
        memory_bytes=80 * 2**30,
        disk_bytes_per_second=5 * _GB,
        **_DATA_CENTRE,
        source="NVIDIA H100 Tensor Core GPU data sheet; its 1979 TFLOP/s count zeros of sparse matrices, half of it is "
        "dense",
        url="https://www.nvidia.com/en-us/data-center/h100/",
    ),
)

KNOWN: Final[Mapping[str, DataSheet]] = MappingProxyType({sheet.name: sheet for sheet in _SHEETS})
"""The data sheets by name, from small to large."""


def known_device(name: str) -> Device:
    """Return the device of that name. Raises: ValueError listing what there is if it is unknown."""
    if name not in KNOWN:
        raise ValueError(
            f"no device is called {name!r}{closest(name, KNOWN)} (there are {one_of(KNOWN)}); a mapping with all rates "
            f"of a device describes any other"
        )
    return KNOWN[name].device


def named(value: Any) -> Any:
    """Return the device a word stands for, and anything else as it is: for a configuration's keys."""
    return known_device(value) if isinstance(value, str) else value


def table() -> str:
    """Return the known devices as a table in Markdown, with what is assumed and where the rest comes from."""
    head = (
        "| `device` | | peak TFLOP/s | of it | peak GB/s | of it | memory GB | disk GB/s | down, up Mbit/s |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    rows = [
        f"| `{sheet.name}` | {sheet.title} | {sheet.peak_flops_per_second / _TERA:.4g} ({sheet.precision}) "
        f"| {sheet.flops_efficiency:.0%} | {sheet.peak_memory_bytes_per_second / _GB:.4g} "
        f"| {sheet.memory_efficiency:.0%} | {sheet.memory_bytes / _GB:.3g} | {sheet.disk_bytes_per_second / _GB:.2g} | "
        f"{sheet.download_bytes_per_second / _MEGABIT:.0f}, {sheet.upload_bytes_per_second / _MEGABIT:.0f} |"
        for sheet in _SHEETS
    ]
    sources = [f"* `{sheet.name}`: {sheet.source}. <{sheet.url}>" for sheet in _SHEETS]
    return "\n".join([head, *rows, "", *sources]) + "\n"
