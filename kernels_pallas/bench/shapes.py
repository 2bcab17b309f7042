"""The products of DeepSeek-V3 that are measured, and DeepGEMM's published speeds."""

import dataclasses

# Linears of V3, [out, in]: N and K of the forward product. Source: the released config; also DeepGEMM's benchmark.
LINEARS = {
    "q_a and kv_a": (2112, 7168),
    "kv_a": (576, 7168),
    "q_b": (24576, 1536),
    "kv_b": (32768, 512),
    "o": (7168, 16384),
    "gate and up": (4096, 7168),
    "down": (7168, 2048),
}
ROWS = (1, 64, 128, 4096)
HEADS = (2, 4096, 16, 192, 128)  # sequences, their length, heads (V3 has 128), widths of keys and values
EXPERTS = ("gate and up", "down")
GROUPS = ((4, 8192), (8, 4096))  # groups, rows in each


@dataclasses.dataclass(frozen=True)
class Shape:
    """The product [m, k] · [n, k]ᵀ. With `groups`, each group has m rows, or, for a weight gradient, k columns."""

    operation: str  # "dense", "grouped", "weight gradient" or "grouped weight gradient"
    name: str
    m: int
    n: int
    k: int
    groups: int = 1

    @property
    def title(self) -> str:
        return f"{self.operation}, {self.name}"

    @property
    def text(self) -> str:
        return f"{f'{self.groups} × ' if self.groups > 1 else ''}{self.m} × {self.n} × {self.k}"

    @property
    def flops(self) -> int:
        return 2 * self.groups * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """The bytes read and written, each once: operands in E4M3, without their scales, and the result in bfloat16, or
        float32 for a weight gradient."""
        return self.groups * ((self.m + self.n) * self.k + self.m * self.n * (4 if "gradient" in self.operation else 2))

    def shrunk(self) -> "Shape":
        """The shape with a sixteenth of each size over 128, to try the program where it is slow."""
        smaller = {
            field: -(-getattr(self, field) // 16) if getattr(self, field) > 128 else getattr(self, field)
            for field in "mnk"
        }
        return dataclasses.replace(self, **smaller)


def shapes() -> tuple[Shape, ...]:
    dense = [Shape("dense", name, m, n, k) for m in ROWS for name, (n, k) in LINEARS.items()]
    gradients = [Shape("weight gradient", name, k, n, 4096) for name, (n, k) in LINEARS.items()]
    grouped = [Shape("grouped", name, m, *LINEARS[name], groups) for groups, m in GROUPS for name in EXPERTS]
    grouped += [
        Shape("grouped weight gradient", name, LINEARS[name][1], LINEARS[name][0], m, groups)
        for groups, m in GROUPS
        for name in EXPERTS
    ]
    return (*dense, *gradients, *grouped)


# TFLOP/s on an H800 by (operation, groups, m, n, k), from the README of DeepGEMM's first release. Hardware and clocks
# differ from those that the benchmark runs on.
DEEPGEMM = {
    ("dense", 1, 64, 2112, 7168): 206,
    ("dense", 1, 64, 24576, 1536): 289,
    ("dense", 1, 64, 32768, 512): 219,
    ("dense", 1, 64, 7168, 16384): 336,
    ("dense", 1, 64, 4096, 7168): 287,
    ("dense", 1, 64, 7168, 2048): 295,
    ("dense", 1, 128, 2112, 7168): 352,
    ("dense", 1, 128, 24576, 1536): 535,
    ("dense", 1, 128, 32768, 512): 358,
    ("dense", 1, 128, 7168, 16384): 645,
    ("dense", 1, 128, 4096, 7168): 533,
    ("dense", 1, 128, 7168, 2048): 510,
    ("dense", 1, 4096, 2112, 7168): 1058,
    ("dense", 1, 4096, 24576, 1536): 990,
    ("dense", 1, 4096, 32768, 512): 590,
    ("dense", 1, 4096, 7168, 16384): 1358,
    ("dense", 1, 4096, 4096, 7168): 1304,
    ("dense", 1, 4096, 7168, 2048): 1025,
    ("grouped", 4, 8192, 4096, 7168): 1297,
    ("grouped", 4, 8192, 7168, 2048): 1099,
    ("grouped", 8, 4096, 4096, 7168): 1288,
    ("grouped", 8, 4096, 7168, 2048): 1093,
}


def deepgemm(shape: Shape) -> float | None:
    return DEEPGEMM.get((shape.operation, shape.groups, shape.m, shape.n, shape.k))
