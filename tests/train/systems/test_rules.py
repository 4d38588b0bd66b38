"""Rules fitted on images of a few kinds, whose best stops are known."""

import pytest
import torch

from blockdrop_fast.networks.exits import NEVER
from train.systems import rules as rules_module
from train.systems.rules import (
    ALWAYS,
    Stops,
    budget_of,
    fit,
    learn_rules,
    meet,
    separate,
    share_rules,
)

BLOCKS = torch.tensor([2.0, 5.0, 10.0]).double()


def make_stops(kinds, each=50):
    """Images of kinds [(probabilities, right) of every stop]; the label is 0, told by the first."""
    logits = []
    for stops in zip(*kinds, strict=True):
        of_stop = []
        for probabilities, right in stops:
            one = torch.tensor(probabilities).log()
            of_stop.append((one if right else one.roll(1)).expand(each, -1))
        logits.append(torch.cat(of_stop))
    labels = torch.zeros(len(kinds) * each, dtype=torch.int64)
    return Stops(torch.stack(logits), labels, BLOCKS[-len(logits) :], BLOCKS[-len(logits) :] * 1e6)


SURE, FLAT = [0.97, 0.01, 0.01, 0.01], [0.4, 0.2, 0.2, 0.2]
TORN = [0.5, 0.48, 0.01, 0.01]


@pytest.mark.parametrize(
    ("price", "stays"), [(0.0, [0, 0, 0]), (0.5, [0, 1, 0]), (100.0, [0, 1, 2])]
)
def test_learned_rules_find_the_cheapest_stops(price, stays):
    """Right from the first stop on; from the second; from the last, whose work costs 0.8 more."""
    kinds = [
        [(SURE, True), (SURE, True), (SURE, True)],
        [(FLAT, False), (SURE, True), (SURE, True)],
        [(TORN, False), (TORN, False), (SURE, True)],
    ]
    stops = make_stops(kinds)
    at = stops.stay(learn_rules(stops, price))
    assert at.view(3, -1).unique(dim=1).squeeze(1).tolist() == stays


def test_nothing_is_lost_where_the_last_stop_is_wrong_too():
    kinds = [[(SURE, True)] * 3, [(FLAT, False)] * 3]
    stops = make_stops(kinds)
    assert (stops.stay(learn_rules(stops, 1e6)) == 0).all()


def test_learned_rules_see_what_thresholds_cannot():
    """The larger first probability is the worse one: its second is close."""
    kinds = [[(TORN, False), (SURE, True)], [(FLAT, True), (SURE, True)]]
    held_out, test = make_stops(kinds), make_stops(kinds, 20)
    rules, report = fit(held_out, test, 7.5, "learned")
    learned, threshold = (report["at_budget"][kind]["test"] for kind in ("learned", "threshold"))
    assert learned == {
        "accuracy": 1.0,
        "blocks": 7.5,
        "flops": 7.5e6,
        "routing_gain": pytest.approx(0.25),
        "shares": [0.5, 0.5],
    }
    assert threshold["accuracy"] == 0.5
    assert test.stay(rules).tolist() == [1] * 20 + [0] * 20
    assert report["held_out_images"] == 100
    assert torch.equal(fit(held_out, test, 7.5, "threshold")[0], share_rules(held_out, 1.0))


def random_stops(seed=0):
    """Later stops are right more often, and sure ones more often than others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (400,), generator=generator)
    skill = torch.rand(1, 400, 1, generator=generator)
    skill = torch.tensor([1.0, 2.0, 4.0])[:, None, None] * skill
    logits = torch.randn(3, 400, 5, generator=generator)
    return Stops(
        logits + skill * torch.nn.functional.one_hot(labels, 5), labels, BLOCKS, BLOCKS * 1e6
    )


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0, 1.95])
def test_shares_go_as_powers_of_a_ratio(ratio):
    stops = random_stops()
    shares = torch.tensor([ratio, ratio**2, ratio**3])
    found = torch.tensor(stops.point(share_rules(stops, ratio))["shares"])
    assert (found - shares / shares.sum()).abs().max() <= 1 / 400


def test_budgets_are_met_and_more_work_gives_more(monkeypatch):
    monkeypatch.setattr(rules_module, "PRICES", (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 64.0))
    stops, points = random_stops(), []
    for budget in (2.0, 4.0, 6.0, 8.0, 10.0):
        rules, report = fit(stops, stops, budget, "learned")
        for kind in ("learned", "threshold"):
            # Thresholds do not come down to the first stop alone.
            found, sweep = report["at_budget"][kind]["held_out"], report["sweep"][kind]
            assert found["blocks"] <= max(budget, sweep[0]["held_out"]["blocks"])
        points.append(stops.point(rules))
        assert points[-1]["blocks"] > budget - 0.5
    accuracies = [point["accuracy"] for point in points]
    assert accuracies == sorted(accuracies)
    assert points[0]["blocks"] == 2
    assert points[2]["routing_gain"] > 0.03


def test_a_budget_of_everything_is_met_without_a_search():
    stops = random_stops()
    value, rules = meet(10.0, stops, lambda value: torch.tensor([NEVER] * 2), (1.0, 2.0))
    assert (value, stops.point(rules)["blocks"]) == (2.0, 10.0)


def test_everybody_gains_or_nobody():
    logits = torch.randn(10, 4)
    assert separate(logits, torch.ones(10)).tolist() == list(ALWAYS)
    assert separate(logits, -torch.ones(10)).tolist() == list(NEVER)


def test_budgets_of_options():
    assert budget_of(None, [2, 5, 15], 15) == 7.5
    assert budget_of(None, [9, 24], 15) == 9
    assert budget_of(9.5, [9, 24], 15) == 9.5
    for budget in (8.9, 24.1):
        with pytest.raises(ValueError, match=rf"^budget: expected 9 to 24 blocks, got {budget}"):
            budget_of(budget, [9, 24], 15)
