"""Verdicts on the paper's claims: how often the rule is wrong, what a claim needs, and what decides it."""
import json
import math

import pytest
import torch

import claims
from claims import decide, pool, side, standard_error
from reads import PAPER

# ---- the rule ----------------------------------------------------------------------------------------------


def two_arms(noise, generator, seeds=3, tests=40, problems=300, samples=4):
    """Values [tests, seeds, problems] of tests without an effect: two arms, the noise of either's seeds.

    In logits: problems differ by 1.8, what an arm does to a problem by 0.4, a seed to a problem by 0.3, and a
    seed to all of them by `noise` (0.08 is 1.5 points of accuracy).
    """
    def arm(seed_noise):
        logits = easy + 0.4 * torch.randn(tests, 1, problems, generator=generator)
        logits = logits + seed_noise * torch.randn(tests, seeds, 1, generator=generator)
        right = (logits + 0.3 * torch.randn(tests, seeds, problems, generator=generator)).sigmoid()
        return (torch.rand(samples, *right.shape, generator=generator) < right).double().mean(0)
    easy = 0.6 + 1.8 * torch.randn(tests, 1, problems, generator=generator)
    return arm(noise[0]) - arm(noise[1])


def wrong_rates(noise, rule, seeds=3):
    """Shares of wrong 'holds' and 'does not hold' of a rule(values, pooled variance) -> error [tests]."""
    found, generator = [], torch.Generator().manual_seed(0)
    for _ in range(60):                                     # reports of 40 ordinary tests, which are pooled
        ordinary, odd = two_arms(noise[:1] * 2, generator, seeds), two_arms(noise, generator, seeds)
        pooled = ordinary.mean(-1).var(-1).mean().item()
        means, errors = odd.mean((1, 2)).tolist(), rule(odd, pooled).tolist()
        found += [side(mean, se, 40 * (seeds - 1)) for mean, se in zip(means, errors)]
    return found.count("holds") / len(found), found.count("does not hold") / len(found)


@pytest.mark.parametrize("noise", [(0.08, 0.08), (0.08, 0.16), (0.15, 0.15), (0.15, 0.3)])
@pytest.mark.parametrize("seeds", [3, 6])
def test_without_an_effect_at_most_7_in_100_tests_are_wrong_on_either_side(noise, seeds):
    assert max(wrong_rates(noise, standard_error, seeds)) <= 0.07


def test_the_simulation_finds_rules_that_are_wrong_too_often():
    noise = 0.15, 0.3                                       # one arm with twice the noise of all others
    pooled_only = wrong_rates(noise, lambda values, seeds: torch.full((40,), (seeds / 3) ** 0.5))
    own_only = wrong_rates(noise, lambda values, seeds: (values.mean(-1).var(-1) / 3).sqrt())
    assert max(pooled_only) > 0.07 and max(own_only) > 0.07


@pytest.mark.parametrize("mean, se, df, k, expected", [
    (0.05, 0.02, 100, 1, "holds"), (-0.05, 0.02, 100, 1, "does not hold"), (0.03, 0.02, 100, 1, "undecided"),
    (-0.042, 0.02, 100, 1, "does not hold"), (-0.042, 0.02, 100, 3, "undecided"),   # one of three tests
    (0.05, 0.02, 2, 1, "undecided"), (0.5, 0.02, 0, 1, "undecided")])               # few, and no, degrees
def test_a_test_says_what_its_interval_allows(mean, se, df, k, expected):
    assert side(mean, se, df, k) == expected


def test_the_error_holds_seeds_and_problems_and_counts_sampling_once():
    generator = torch.Generator().manual_seed(1)
    problems = torch.randn(1, 1, 300, generator=generator)
    seeds = torch.randn(4000, 3, 1, generator=generator)
    draws = torch.randn(4000, 3, 300, generator=generator)
    values = (0.2 * problems + 0.02 * seeds + 0.3 * draws).double()
    wanted = 0.2 ** 2 / 300 + (0.02 ** 2 + 0.3 ** 2 / 300) / 3
    # one set of problems
    assert (standard_error(values, 0.0) ** 2).mean().item() == pytest.approx(wanted, rel=0.15)
    assert standard_error(values[:1, :1], 0.01).item() == pytest.approx(
        (0.01 + values[0, 0].var().item() / 300) ** 0.5)    # one seed: its variance is the others'
    assert standard_error(values[:, :, :1], 1.0).min() >= 3 ** -0.5     # never below the pooled


# ---- what a claim needs ------------------------------------------------------------------------------------

def test_every_claim_has_a_premise_tests_and_margins_with_a_reason():
    usual = {("above", 1), ("below", 2)}                    # better, no gain: RULE gives the reason
    for claim in PAPER["claims"]:
        assert set(claim) <= {"number", "where", "text", "why", "premise", "tests"} and claim["tests"]
        for test in claim["premise"] + claim["tests"]:
            assert set(test) - {"if_run", "extra"} in ({"metric", "plus", "minus", "above"},
                                                       {"metric", "plus", "minus", "below"})
            (bound,) = ((key, test[key]) for key in ("above", "below") if key in test)
            own = bound not in usual or test["metric"] not in claims.ACCURACIES
            assert not own or "why" in claim, f"claim {claim['number']}: {bound}"


ARGS = {"model": "base", "rollouts": "runs/seed0/rollouts", "batch_prompts": 8}


def model(name="toy", seeds="012", **accuracies):
    """A read model: of each run its accuracy, one or one per seed, on 40 problems and 20 to choose on."""
    def rows(accuracy, kl=0.01):
        length = 80.0 if name == "long" else 40.0
        row = {"k": 1, "avg_at_k": accuracy, "kl": kl, "entropy": 0.5, "mean_length": length}
        return {b: row | {"correct_per_problem": [1] * round(accuracy * n) + [0] * (n - round(accuracy * n))}
                for b, n in (("test", 40), ("validation", 20))}
    runs = {}
    for label, values in accuracies.items():
        for seed, accuracy in zip(seeds, values if isinstance(values, list) else [values] * len(seeds)):
            run = {"info": {"script": "teacher.py", "args": ARGS},
                   "metrics": [{"step": 8, "seconds": 1.0}],
                   "rows": {b: {8: row} for b, row in rows(accuracy).items()}}
            runs.setdefault(label.replace("_", "-"), {})[seed] = run
    return {"name": name, "runs": runs, "base": rows(0.4, 0.0), "seeds": sorted(seeds), "scored": ["test"],
            "own": ["test"], "selection": "validation", "kl": "test", "rehearsal": False, "seconds": {},
            "prompts": {f"seed{seed}/rollouts": 100 for seed in seeds}}


def claim(*tests, premise=()):
    return {"number": "0", "where": ["table1"], "text": "x", "premise": list(premise), "tests": list(tests)}


def better(plus, minus, **more):
    return {"metric": "accuracy", "plus": [plus], "minus": [minus], "above": 1} | more


POOLS = {"accuracy": (1e-4, 50), "kl": (1e-2, 50)}


def test_verdicts_of_made_up_runs():
    toy = model(good=0.8, bad=0.2, same=0.4)
    none = {"metric": "accuracy", "plus": ["same"], "minus": ["base"], "below": 6}
    verdict = lambda *tests, **more: decide(claim(*tests, **more), [toy], POOLS)[0]         # noqa: E731
    assert verdict(better("good", "base")) == "holds" and verdict(better("bad", "base")) == "does not hold"
    assert verdict(better("same", "base")) == "undecided"
    assert verdict(none) == "holds"                         # no gain of 6 points
    assert verdict(better("good", "base"), better("same", "base")) == "undecided"
    assert verdict(better("good", "base"), better("missing", "base")) == "not run here"
    assert verdict(better("good", "base"), better("bad", "base", extra="ours")) == "holds"
    assert verdict(better("good", "base"), premise=[better("base", "bad")]) == "holds"
    assert verdict(better("good", "base"), premise=[better("bad", "base")]) == "premise absent here"
    assert verdict(better("good", "base"), premise=[better("missing", "base")]) == "not run here"


def test_a_world_with_one_seed_is_shown_and_does_not_decide_beside_others():
    worlds = [model(good=0.8), model("long", "0", good=0.2)]
    answer, _, lines = decide(claim(better("good", "base")), worlds, POOLS)
    assert answer == "holds" and [(line["n"], line["decides"]) for line in lines] == [(3, True), (1, False)]
    assert decide(claim(better("good", "base")), worlds[1:], POOLS)[0] == "does not hold"   # the only one
    with_premise = claim(better("good", "base"), premise=[better("good", "base")])
    assert decide(with_premise, worlds, POOLS)[0] == "holds"
    slope = {"metric": "gain_per_doubling", "plus": ["good"], "minus": ["base"], "above": 1}
    answer, _, (line,) = decide(claim(slope), worlds, POOLS)
    assert answer == "does not hold" and line["n"] == "3+1" and line["mean"] == pytest.approx(-0.6)
    assert decide(claim(slope), worlds[:1], POOLS)[0] == "not run here"


def test_one_seed_everywhere_decides_nothing():
    lone = model(seeds="0", good=0.8)
    answer, premise, lines = decide(claim(better("good", "base")), [lone], pool([lone]))
    assert answer == "undecided" and "[?, ?], above 1, n = 1" in claims.claim_text(
        claim(better("good", "base")), answer, premise, lines)


def test_variances_are_pooled_over_all_tests_per_checkpoint(monkeypatch):
    toy = model(a=[0.5, 0.6, 0.7], b=[0.5, 0.5, 0.5], c=[0.4, 0.6, 0.8])
    monkeypatch.setitem(PAPER, "claims", [claim(better("a", "b"), better("c", "base"))])
    variance, df = pool([toy])["accuracy"]
    assert df == 4 and variance == pytest.approx((0.01 / 2 + 0.04) / 2)     # of two checkpoints, and of one
    twice = claim(better("a", "b"), better("a", "b", above=3))              # two bounds of one number
    doubled = claim({"metric": "accuracy", "plus": ["a", "a"], "minus": ["b", "c"], "above": 1})
    monkeypatch.setitem(PAPER, "claims", [twice, doubled])
    variance, df = pool([toy])["accuracy"]
    assert df == 4 and variance == pytest.approx((0.01 / 2 + 0.0 / 6) / 2)  # 2a - b - c does not vary here


def test_a_ratio_is_compared_as_a_logarithm():
    toy = model(far=0.5, near=0.5)
    for seed in "012":
        toy["runs"]["far"][seed]["rows"]["test"][8] |= {"kl": 0.03}
    test = {"metric": "kl", "plus": ["far"], "minus": ["near"], "above": 1.1}
    answer, premise, lines = decide(claim(test), [toy], POOLS)
    assert answer == "holds" and lines[0]["mean"] == pytest.approx(math.log(3))
    assert "kl: far against near = ×3.00 [" in claims.claim_text(claim(test), answer, premise, lines)


def test_a_student_is_compared_with_whole_paths_at_equal_kl_and_at_the_papers_hours():
    toy = model(student=0.7, teacher=0.6)
    for seed in "012":
        student, teacher = (toy["runs"][label][seed] for label in ("student", "teacher"))
        early = json.loads(json.dumps(teacher["rows"]))     # step 4 is as good as the student, at half its KL
        for b, path in teacher["rows"].items():
            path[4] = student["rows"][b][8] | {"kl": 0.005}
            path[8] = early[b]["8"] | {"kl": 0.1}
        teacher["metrics"] = [{"step": i, "seconds": 1.0} for i in (4, 8)]
        student["info"]["script"] = "distill.py"
        student["info"]["args"] = ARGS | {"teacher": f"/seed{seed}/teacher/final"}
    whole = {"metric": "ahead", "plus": ["student"], "minus": ["teacher"], "above": 1}
    values = claims.values_of_test(toy, whole, ["table1"])
    assert values.shape == (3, 40) and values.abs().max() == 0
    last = claims.values_of_test(toy, whole | {"metric": "ahead_of_last"}, ["table1"])
    line = 0.4 + (0.6 - 0.4) * 0.01 / 0.1                   # from the base to the last
    assert last.mean().item() == pytest.approx(0.7 - line)
    assert claims.values_of_test(toy, whole | {"if_run": ["missing"]}, ["table1"]) is not None
    assert claims.values_of_test(toy, whole | {"minus": ["teacher", "missing"]}, ["table1"]) is None
    names = "base", "teacher@4", "student"
    hours = [claims.number(toy, "0", "paper_hours", name, ["test"]) for name in names]
    # Table 4 at a tenth of its prompts, in steps of a quarter
    assert hours == pytest.approx([0, 0.7 + 4 * 75 / 3600, 0.7 + 8 * 75 / 3600 + 8 * 100 / 3600])
    for seed in "012":                                      # on-policy, each step has rollouts of its own
        toy["prompts"] |= {f"seed{seed}/teacher/rollouts{i:03d}": 8 for i in range(1, 9)}
    assert claims.number(toy, "0", "paper_hours", "teacher@4", ["test"]) == pytest.approx(
        4 * (8 * 25.2 + 75) / 3600)
