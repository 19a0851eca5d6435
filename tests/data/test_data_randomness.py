"""Seeds are pure functions of what they are mixed from."""

import torch

from kdcli.data.randomness import generator, mix


def test_mix_is_fixed_for_all_time():
    assert mix(0, 1, "order") == mix(0, 1, "order")
    assert (mix(0), mix(3, 7, "order")) == (6148773199958884930, 2522171359264676425)
    assert all(0 <= mix(seed) < 2**63 for seed in range(-50, 50))


def test_mix_separates_parts_and_types():
    values = [mix(1, 23), mix(12, 3), mix("1", 23), mix(123), mix("123"), mix(23, 1), mix(), mix(""), mix("", "")]
    assert len(set(values)) == len(values)


def test_generators_are_independent_of_the_global_one():
    torch.manual_seed(1)
    a = torch.rand(3, generator=generator(5, 2, "x"))
    torch.manual_seed(2)
    assert torch.equal(a, torch.rand(3, generator=generator(5, 2, "x")))
    assert not torch.equal(a, torch.rand(3, generator=generator(5, 3, "x")))
