"""Names of data sets: spellings, suggestions, and no torch."""

import subprocess
import sys

import pytest

from kdcli.data import names
from kdcli.errors import UsageError


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("CIFAR-100", "cifar100"),
        ("cifar_10", "cifar10"),
        ("STL-10", "stl10"),
        ("tiny-imagenet", "tinyimagenet"),
        ("Tiny-ImageNet-200", "tinyimagenet"),
        ("imagenet-1k", "imagenet"),
        ("digits", "digits"),
        ("synthetic:7", "synthetic:7"),
        ("synthetic:10", "synthetic"),
        ("Folder:/Some/Path:x", "folder:/Some/Path:x"),
    ],
)
def test_canonical(typed, name):
    assert names.canonical(typed) == name
    assert names.canonical(name) == name
    assert names.default_size(name) > 0
    assert names.describe(typed)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UsageError) as caught:
        names.canonical("cifar1000")
    assert caught.value.field == "data.dataset"
    assert "cifar100" in caught.value.hint


@pytest.mark.parametrize("typed", ["", "folder:", "folder", "synthetic:1", "synthetic:x", "synthetic:²", "cifar100:x"])
def test_bad_names_are_usage_errors(typed):
    with pytest.raises(UsageError):
        names.canonical(typed)


def test_known_names_are_described_and_sized():
    assert [n.partition(":")[0] for n in names.known()] == list(names.DEFAULT_SIZE)
    assert all(names.describe(name) for name in names.known())


def test_names_do_not_import_torch():
    code = "import sys, kdcli.data.names, kdcli.data; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
