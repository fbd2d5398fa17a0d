"""Logits -> token: the filters against a float64 oracle, the draw against its distribution.

python -m pytest tests/drivers/test_sampler.py
"""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from qwen3c.drivers.sampler import RECOMMENDED, Sampler, Sampling, default_sampling
from qwen3c.kernels.draw import draw, pick_index

Floats = NDArray[np.float64]


def oracle(logits: ArrayLike, prompt: list[int], reply: list[int], s: Sampling) -> Floats:
    """The probability of every token, in float64, straight from the definitions."""
    x = np.asarray(logits, dtype=np.float64).copy()
    for id, bias in s.logit_bias.items():
        x[id] += bias
    for id in {*prompt, *reply}:
        x[id] = x[id] / s.repetition_penalty if x[id] > 0 else x[id] * s.repetition_penalty
    for id, n in Counter(reply).items():
        x[id] -= s.presence_penalty + n * s.frequency_penalty
    x /= s.temperature
    if s.top_k:
        x[np.argsort(-x, kind="stable")[s.top_k :]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    order, before = np.argsort(-p, kind="stable"), 0.0
    for id in order:
        mass = p[id]
        if before >= s.top_p and id != order[0]:
            p[id] = 0
        before += mass
    p[p < s.min_p * p.max()] = 0
    return p / p.sum()


def logits_of(seed: int, n: int = 12, spread: float = 2.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32)


def chi_square_p(observed: Floats, expected: Floats) -> float:
    """The chance of a fit this bad (Wilson and Hilferty's approximation of the chi-square tail)."""
    used = expected > 0
    assert not observed[~used].any(), "a token with probability 0 was drawn"
    n = int(used.sum()) - 1
    if n == 0:
        return 1.0
    statistic = float(((observed[used] - expected[used]) ** 2 / expected[used]).sum())
    z = ((statistic / n) ** (1 / 3) - (1 - 2 / (9 * n))) / math.sqrt(2 / (9 * n))
    return 0.5 * math.erfc(z / math.sqrt(2))


CASES = [
    Sampling(),
    Sampling(temperature=0.6, top_k=20, top_p=0.95),
    Sampling(temperature=0.7, top_k=5, top_p=0.8),
    Sampling(temperature=1.5, top_p=0.7),
    Sampling(temperature=1.3, min_p=0.1),
    Sampling(temperature=2.0, top_k=8, top_p=0.9, min_p=0.2),
    Sampling(temperature=0.9, presence_penalty=1.0, frequency_penalty=0.3),
    Sampling(temperature=0.8, repetition_penalty=1.3, top_k=6),
    Sampling(temperature=1.0, logit_bias={0: 2.0, 3: -100.0}),
    Sampling(
        temperature=1.1,
        logit_bias={1: 1.0},
        presence_penalty=0.5,
        repetition_penalty=0.8,
        top_p=0.9,
        min_p=0.02,
    ),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_draws_follow_the_exact_distribution(case: int) -> None:
    """100,000 draws in all; a p-value under 1e-4 in one of ten cases is no accident."""
    s, draws = CASES[case], 10_000
    prompt, reply = [1, 2], [3, 3, 4]
    logits = logits_of(case)
    counts = np.zeros(len(logits))
    for i in range(draws):
        sampler = Sampler(Sampling(**{**vars(s), "seed": draws * case + i}), prompt, len(logits))
        for token in reply:
            sampler.accept(token)
        counts[sampler.sample(logits)] += 1
    assert chi_square_p(counts, draws * oracle(logits, prompt, reply, s)) > 1e-4


def test_the_comparison_notices_a_wrong_distribution() -> None:
    p = oracle(logits_of(0), [], [], Sampling())
    wrong = oracle(logits_of(0), [], [], Sampling(temperature=1.1))
    drawn = np.random.default_rng(0).multinomial(10_000, wrong).astype(np.float64)
    assert chi_square_p(drawn, 10_000 * p) < 1e-4
    fair = np.random.default_rng(0).multinomial(10_000, p).astype(np.float64)
    assert chi_square_p(fair, 10_000 * p) > 1e-4


def test_only_tokens_the_oracle_keeps_are_drawn() -> None:
    for seed in range(300):
        r = np.random.default_rng(seed)
        s = Sampling(
            temperature=float(r.choice([0.3, 0.7, 1.0, 1.7])),
            top_k=int(r.choice([0, 1, 3, 20, 400])),
            top_p=float(r.choice([0.0, 0.1, 0.55, 0.9, 0.999, 1.0])),
            min_p=float(r.choice([0.0, 0.01, 0.3, 1.0])),
            seed=seed,
        )
        logits = logits_of(seed, n=300)
        p = oracle(logits, [], [], s)
        sampler = Sampler(s, [], len(logits))
        assert all(p[sampler.sample(logits)] > 0 for _ in range(30)), s


def test_every_number_picks_a_possible_index() -> None:
    r = np.random.default_rng(1)
    for n in (1, 2, 3, 5, 64, 100):
        for _ in range(50):
            p = (r.random(n) * (r.random(n) < 0.5)).astype(np.float32)
            p[r.integers(n)] = 1e-30
            for uniform in (0.0, r.random(), 1 - 2**-53):
                assert p[pick_index(p, uniform)[0]] > 0
    # equal shares of [0, 1) for equal probabilities
    counts = np.bincount([pick_index(np.full(8, 0.1, np.float32), i / 8000)[0] for i in range(8000)])
    assert (counts == 1000).all()


def test_greedy_takes_the_largest_and_of_equals_the_lowest_id() -> None:
    logits = np.array([0, 5, -1, 5, 5], dtype=np.float32)
    for temperature in (0, 1e-6):
        assert Sampler(Sampling(temperature=temperature), [], 5).sample(logits) == 1
    for one in ({"top_k": 1}, {"top_p": 0.0}):
        assert {Sampler(Sampling(**one, seed=i), [], 5).sample(logits) for i in range(20)} == {1}
    assert {Sampler(Sampling(min_p=1.0, seed=i), [], 5).sample(logits) for i in range(50)} == {1, 3, 4}
    assert Sampler(Sampling(temperature=0, logit_bias={2: 10.0}), [], 5).sample(logits) == 2


def test_tokens_that_do_not_exist_are_never_chosen() -> None:
    logits = np.zeros(100, dtype=np.float32)
    logits[[3, 90, 99]] = 50
    for s in (
        Sampling(temperature=0),
        Sampling(top_k=20, seed=1),
        Sampling(seed=1),
        Sampling(top_p=0.9, seed=1),
    ):
        sampler = Sampler(s, [], 90, undefined=[3])
        assert all(sampler.sample(logits) not in (3, *range(90, 100)) for _ in range(50))
        logprob, top = sampler.logprobs(logits, 5, 90)
        assert math.isclose(logprob, -math.log(89), rel_tol=1e-6) and top[-1][1] == -math.inf


def test_penalties_grow_with_the_reply() -> None:
    logits = np.array([1.0, 0.9, 0.8, 0.7], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=0.15), [], 4)
    expected, counts = [], np.zeros(4)
    for _ in range(12):
        expected.append(int(np.argmax(logits - np.float32(0.15) * counts)))
        counts[expected[-1]] += 1
    assert [sampler.sample(logits) for _ in range(12)] == expected
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), [0], 4)
    assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 3]  # the prompt counts too


def test_logprobs_are_those_of_the_model_whatever_the_sampling() -> None:
    logits = logits_of(7, n=50)
    p = oracle(logits, [], [], Sampling())
    for s in (Sampling(temperature=0), Sampling(temperature=0.3, top_k=2, presence_penalty=2.0, seed=1)):
        sampler = Sampler(s, [], 50)
        sampler.sample(logits)
        logprob, top = sampler.logprobs(logits, 9, 5)
        assert logprob == pytest.approx(math.log(p[9]), abs=1e-5)
        assert [id for id, _ in top] == list(np.argsort(-p, kind="stable")[:5])
        assert [value for _, value in top] == pytest.approx([math.log(p[id]) for id, _ in top], abs=1e-5)
        best, _ = sampler.logprobs(logits, top[0][0], 0)
        assert best == top[0][1]  # the same float, which some clients compare


def test_the_seed_decides() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=3.0, seed=seed), [], 50)
        return [sampler.sample(logits_of(i, n=50)) for i in range(50)]

    assert draws(5) == draws(5) != draws(6)
    assert draws(None) != draws(None)
    sampler = Sampler(Sampling(temperature=3.0), [], 50)
    again = Sampler(Sampling(temperature=3.0, seed=sampler.seed), [], 50)
    rows = [logits_of(i, n=50) for i in range(9)]
    assert [sampler.sample(row) for row in rows] == [again.sample(row) for row in rows]


def test_the_random_numbers_are_those_of_every_machine() -> None:
    """The first draws of seed 42 by this recipe, written down: they must never change."""
    logits = np.zeros(1000, dtype=np.float32)
    sampler = Sampler(Sampling(seed=42), [], 1000)
    assert [sampler.sample(logits) for _ in range(5)] == [907, 122, 519, 776, 575]


def test_the_random_numbers_are_philoxs() -> None:
    """Among 2^16 equal tokens the first 16 bits of a number are those of the token, backwards."""
    logits = np.zeros(1 << 16, dtype=np.float32)
    for seed in (0, 1, 42, (1 << 64) - 1):
        philox = np.random.Philox(key=seed)
        sampler = Sampler(Sampling(seed=seed), [7] * 5, len(logits))
        state: Any = philox.state
        for position in range(5, 25):
            state["state"]["counter"][0] = position
            philox.state = state
            bits = f"{int(philox.random_raw()) >> 48:016b}"
            assert sampler.sample(logits) == int(bits[::-1], 2)


ROWS = [
    Sampling(temperature=0),
    Sampling(top_k=5, seed=1),
    Sampling(seed=1),
    Sampling(top_p=0.5, seed=1),
    Sampling(min_p=0.1, seed=1),
    Sampling(top_p=0.999, temperature=3.0, seed=1),
    Sampling(repetition_penalty=1.2, presence_penalty=0.3, logit_bias={5: 3.0}, seed=1),
]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("n", [3, 64, 65, 700, 5000])
def test_rows_drawn_together_are_those_drawn_alone(n: int, threads: int) -> None:
    """Tokens, shares and log-probabilities, to the bit; one broken row fails alone."""
    alone = [Sampler(s, [1, 2], n, undefined=[0] * (n > 9)) for s in ROWS if n > 5 or not s.logit_bias]
    together = [Sampler(s.sampling, [1, 2], n, undefined=[0] * (n > 9)) for s in alone]
    for step in range(12):
        rows = [logits_of(100 * step + i, n + 3) for i in range(len(alone))]
        allowed = [np.arange(n) % 3 > 0 if step % 3 == 0 and i % 2 else None for i in range(len(alone))]
        n_top = min(4, n)
        begun = [s.begin(row, mask, n_top) for s, row, mask in zip(together, rows, allowed, strict=True)]
        broken = Sampler(Sampling(seed=1), [], n)
        draw([*begun, broken.begin(np.full(n, np.nan, np.float32))], threads)
        with pytest.raises(ValueError, match="nan"):
            broken.end()
        for one, other, row, mask in zip(together, alone, rows, allowed, strict=True):
            token = other.sample(row, mask)
            assert (one.end(), one.logprob) == (token, other.logprob)
            assert one.measured(row, token) == other.logprobs(row, token, n_top)


def test_a_row_or_mask_of_another_vocabulary_is_refused() -> None:
    sampler = Sampler(Sampling(), [], 10)
    with pytest.raises(ValueError, match="row has 9 logits, the vocabulary 10 tokens"):
        sampler.sample(np.zeros(9, np.float32))
    with pytest.raises(ValueError, match="mask is for 11 tokens, the vocabulary has 10"):
        sampler.sample(np.zeros(12, np.float32), np.ones(11, np.bool_))


@pytest.mark.parametrize("s", [Sampling(temperature=0), Sampling(top_k=5), Sampling(), Sampling(top_p=0.5)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_logits_are_an_error(s: Sampling, value: float) -> None:
    for broken in (
        np.full(100, value, np.float32),
        np.where(np.arange(100) == 40, value, 0).astype(np.float32),
    ):
        with pytest.raises(ValueError, match="largest logit is (nan|inf)"):
            Sampler(s, [], 100).sample(broken)
    with pytest.raises(ValueError, match="-inf"):
        Sampler(s, [], 100).sample(np.full(100, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"temperature": -0.1}, "temperature = -0.1 is not a number from 0 to 100"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": "1"}, "temperature = '1'"),
        ({"temperature": True}, "temperature = True"),
        ({"top_k": -1}, "top_k = -1 is not a whole number from 0"),
        ({"top_k": 2.5}, "top_k = 2.5"),
        ({"top_p": 1.01}, "top_p = 1.01 is not a number from 0 to 1"),
        ({"min_p": -1}, "min_p = -1"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"presence_penalty": math.inf}, "presence_penalty = inf"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 1 << 64}, "seed = 18446744073709551616"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias token id = -1"),
        ({"logit_bias": {5: math.nan}}, "logit_bias of token 5 = nan"),
    ],
)
def test_numbers_out_of_range_are_named(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Sampling(**wrong)


def test_a_bias_for_a_token_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="token 10 does not exist, the vocabulary has 10"):
        Sampler(Sampling(logit_bias={10: 1.0}), [], 10)


def test_defaults_are_the_models_then_the_recommended() -> None:
    own = {"temperature": 0.3, "top_k": 7.0, "max_length": 20}
    hybrid = {"thinking": "hybrid", "generation": own}
    assert default_sampling(hybrid, True) == {"temperature": 0.3, "top_p": 0.95, "top_k": 7}
    # generation_config of a hybrid model describes thinking only
    assert default_sampling(hybrid, False) == RECOMMENDED[False]
    assert default_sampling({"thinking": "none", "generation": own}, False)["temperature"] == 0.3
    assert default_sampling({"thinking": "always", "generation": {}}, True) == RECOMMENDED[True]


def test_sampling_a_large_vocabulary_is_quick() -> None:
    """0.05 ms greedy and 0.25 ms with top-k and top-p are meant; here with room for a busy machine."""
    logits = (np.random.default_rng(0).standard_normal(151_936) * 3).astype(np.float32)

    def best_ms(s: Sampling) -> float:
        sampler, times = Sampler(s, [], 151_669), []
        for _ in range(50):
            begin = time.perf_counter()
            sampler.sample(logits)
            times.append(time.perf_counter() - begin)
        return min(times) * 1e3

    assert best_ms(Sampling(temperature=0)) < 0.5
    assert best_ms(Sampling(temperature=0.6, top_k=20, top_p=0.95, seed=1)) < 1.0
