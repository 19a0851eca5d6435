"""Per-channel mean and standard deviation of each data set's training images, on the 0..1 scale, R G B."""

from __future__ import annotations

Triple = tuple[float, float, float]

_IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

CONSTANTS: dict[str, tuple[Triple, Triple]] = {
    # The literature's constants (METHODS 2.1, 2.3, 7.1), kept digit for digit so that published numbers compare.
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2712)),
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet": _IMAGENET,
    "folder": _IMAGENET,
    # Measured on the 1,437 training images at the default 32x32; a test measures them again.
    "digits": ((0.3057, 0.3057, 0.3057), (0.3235, 0.3235, 0.3235)),
    # Not measured: the generator is centred on mid-grey and mostly within a quarter of the range.
    "synthetic": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


def constants(name: str) -> tuple[Triple, Triple]:
    """`(mean, std)` of a canonical data set name, argument and all."""
    return CONSTANTS[name.partition(":")[0]]
