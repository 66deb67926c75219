"""Looking again where drafting does not seem to pay."""

import itertools

from services.router.scheduling.looks import FIRST, FIRST_WAIT, LONGEST_WAIT, SERIES, Looks


def begun() -> Looks:
    """Behind its first rounds."""
    looks = Looks()
    assert all(looks.due(8, pays=False) for _ in range(FIRST))
    return looks


def first_look(looks: Looks, load: int) -> int:
    """Rounds until it looks again."""
    return next(at for at in range(1000) if looks.due(load, pays=False))


def test_first_rounds_draft_whatever_the_costs_say_and_later_ones_ever_more_seldom() -> None:
    looks = begun()
    rounds = [looks.due(8, pays=False) for _ in range(20_000)]
    begins = [at for at, due in enumerate(rounds) if due and not rounds[at - 1]]
    assert sum(rounds) == SERIES * len(begins)
    gaps = [later - earlier for earlier, later in itertools.pairwise(begins)]
    assert gaps == sorted(gaps)
    assert LONGEST_WAIT <= gaps[-1] <= LONGEST_WAIT + SERIES
    assert sum(rounds) < 0.02 * len(rounds)


def test_what_pays_needs_no_second_look_and_starts_the_waits_over() -> None:
    looks = begun()
    assert not any(looks.due(8, pays=True) for _ in range(1000))
    for _ in range(300):
        looks.due(8, pays=False)
    assert not looks.due(8, pays=True)
    assert first_look(looks, 8) < FIRST_WAIT


def test_what_pays_for_few_does_not_shorten_the_waits_of_many() -> None:
    looks = begun()
    first_look(looks, 8)
    for _ in range(SERIES - 1):
        assert looks.due(15, pays=False)  # the same size
    assert not any(looks.due(3, pays=True) for _ in range(100))
    assert first_look(looks, 8) >= 2 * FIRST_WAIT - 1
    assert first_look(looks, 16) == FIRST_WAIT - 1  # a size of its own
