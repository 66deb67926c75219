"""Looking again where drafting does not seem to pay."""

import itertools

from services.router.scheduling.looks import FIRST, LONGEST_WAIT, SERIES, Looks


def test_first_rounds_draft_whatever_the_costs_say_and_later_ones_ever_more_seldom() -> None:
    looks = Looks()
    assert all(looks.due(pays=False) for _ in range(FIRST))
    rounds = [looks.due(pays=False) for _ in range(20_000)]
    begins = [at for at, due in enumerate(rounds) if due and not rounds[at - 1]]
    assert sum(rounds) == SERIES * len(begins)
    gaps = [later - earlier for earlier, later in itertools.pairwise(begins)]
    assert gaps == sorted(gaps)
    assert LONGEST_WAIT <= gaps[-1] <= LONGEST_WAIT + SERIES
    assert sum(rounds) < 0.02 * len(rounds)


def test_what_pays_needs_no_second_look_and_starts_the_waits_over() -> None:
    looks = Looks()
    assert not any(looks.due(pays=True) for _ in range(1000))
    first = next(at for at in range(1000) if looks.due(pays=False))
    assert first < 40
