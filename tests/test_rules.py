"""Every rule's kernel against the float64 oracle, and bit for bit against itself, on NumPy arrays."""

import numpy as np
import pytest
from conftest import (
    DECAYS,
    DTYPES,
    LAYOUTS,
    STORAGE,
    TERMS,
    WHOLE,
    assert_within,
    names_of,
    oracle,
    own_hypers,
    random_case,
)

import wdops
from wdops import reference
from wdops._load import native

SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1023]
OFFSETS = [0, 1, 3, 8]
N = 2053
CHUNK = 16384  # elements that are swept, and summed, at a time

rules = pytest.mark.parametrize("rule", reference.RULES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def run(rule, arrays, hypers):
    param, *slots, grad = arrays
    wdops.kernels.apply(rule, param, slots, grad, **hypers)
    return [param, *slots]


def bits(arrays):
    """The bytes of each array, with every NaN the same: which of two NaN operands an instruction keeps is not fixed."""
    return [np.where(np.isnan(a), a.dtype.type(np.nan), a).tobytes() for a in arrays]


def test_every_rule_has_an_oracle_and_both_agree_on_names():
    assert [r["name"] for r in native.rules] == list(reference.RULES)
    for r in native.rules:
        rule = reference.RULES[r["name"]]
        assert tuple(r["slots"]) == rule.slots
        others = {"var", "grad", *rule.slots, *reference.CALL_DEFAULTS}
        assert set(r["hypers"]) == set(rule.signature.parameters) - others
        for module in (wdops.ops, wdops.reference):
            apply = getattr(module, f"apply_{rule.name}")
            assert all(name in apply.__doc__ for name in rule.signature.parameters), rule.name


@rules
@dtypes
@pytest.mark.parametrize("decay", ["all", "none"])
def test_three_steps_match_the_oracle(rule, dtype, decay, isa):
    three_steps(rule, dtype, decay)


@rules
@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("decay", sorted(set(DECAYS) - {"all", "none"}))
def test_every_term_alone_matches_the_oracle(rule, dtype, decay):
    three_steps(rule, dtype, decay)


def three_steps(rule, dtype, decay):
    hypers = own_hypers(rule) | DECAYS[decay]
    arrays = random_case(rule, dtype, N)
    for step in range(3):
        # From the kernel's own state, so that errors do not add up over the steps and the bound stays tight.
        want, bound = oracle(rule, arrays[0], arrays[1:-1], arrays[-1], hypers)
        before = [a.copy() for a in arrays]
        got = run(rule, arrays, hypers)
        for name, g, w, b in zip(names_of(rule), got, want, bound, strict=True):
            assert np.isfinite(w).all(), "slots that must be positive have a name with v"
            assert_within(g, w, b, f"{name} at step {step}")
        assert (arrays[-1] == before[-1]).all()
        arrays[-1] = arrays[-1][::-1].copy()


OPTIONS = {
    "accumulator": {"accumulator"},
    "average": {"average"},
    "scaled": {"scaled_proximal"},
    "all": {"accumulator", "average", "scaled_proximal"},
}


def full_case(rule, layout, n, options, seed=0):
    """param, slots and grad, and what `options` names, of a step of n elements."""
    arrays = random_case(rule, layout[0], n, seed, layout[1])
    more = dict(zip(("accumulator", "average"), random_case("momentum", layout[0], n, seed + 1), strict=False))
    return arrays, {name: more.get(name, True) for name in OPTIONS[options]}


@rules
@pytest.mark.parametrize("layout", LAYOUTS, ids="/".join)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_match_the_oracle(rule, layout, options):
    arrays, more = full_case(rule, layout, N, options)
    for overwrite in (False, True) if "average" in more else (False,):
        hypers = own_hypers(rule) | TERMS | {"ema_momentum": 0.6, "ema_overwrite": overwrite}
        want, bound = oracle(rule, arrays[0], arrays[1:-1], arrays[-1], hypers, **more)
        got = run(rule, arrays, hypers | more)
        if "average" in more:
            got.append(more["average"])
        for name, g, w, b in zip([*names_of(rule), "average"], got, want, bound, strict=False):
            assert_within(g, w, b, f"{name}, overwrite={overwrite}")
        if "accumulator" in more:
            assert not more["accumulator"].any()
            more["accumulator"][:] = arrays[-1][::-1]


@rules
@pytest.mark.parametrize("layout", LAYOUTS, ids="/".join)
def test_options_give_the_same_bits_on_every_instruction_set(rule, layout):
    results = {}
    for name in wdops.isa.available():
        wdops.isa.use(name)
        for options in OPTIONS:
            arrays, more = full_case(rule, layout, N, options)
            hypers = own_hypers(rule) | TERMS | {"ema_momentum": 0.6, "seed": 5}
            got = run(rule, arrays, hypers | more)
            results.setdefault(options, {})[name] = bits([*got, *(x for x in more.values() if x is not True)])
    wdops.isa.use(wdops.isa.available()[0])
    for options, of_isa in results.items():
        assert all(parts == of_isa["baseline"] for parts in of_isa.values()), options


@rules
@dtypes
@pytest.mark.parametrize("decay", ["all", "smooth", "none"])
def test_an_option_that_is_neutral_changes_no_bit(rule, dtype, decay, isa):
    smooth = {**TERMS, "l1": 0.0, "clip_value": 0.0, "proximal_l1": 0.0}
    hypers = own_hypers(rule) | (smooth if decay == "smooth" else DECAYS[decay])
    start = random_case(rule, dtype, N)
    start[0][::7] = start[-1][::5] = -0.0
    zeros = np.zeros(N, DTYPES[dtype])
    off = {"proximal_l1": 0.0, "proximal_l2": 0.0}
    for own, more in (
        ({}, {"accumulator": zeros}),
        ({}, {"average": zeros}),
        (off, {"scaled_proximal": True}),
        # A step without l1, a limit of values and a threshold has a loop of its own.
        ({"clip_value": 0.0}, {"clip_value": 3e38}),
        ({"clip_value": 0.0, "average": zeros}, {"clip_value": 3e38}),
    ):
        want = bits(run(rule, [a.copy() for a in start], hypers | own))
        assert bits(run(rule, [a.copy() for a in start], hypers | own | more)) == want, more


@rules
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if "bfloat16" in x], ids="/".join)
def test_stochastic_rounding_is_to_a_neighbour_and_right_on_average(rule, layout, isa):
    """Over the elements of a large tensor, all of whose elements are alike: the mean is the unrounded value."""
    n = 1 << 15
    arrays = [np.full(n, a[7]) for a in random_case(rule, layout[0], 8, 3, layout[1])]
    average = np.full(n, arrays[0][0])
    hypers = own_hypers(rule) | {"seed": 11, "ema_momentum": 0.9}
    one = [a[:1] for a in arrays]
    exact, bounds = oracle(rule, one[0], one[1:-1], one[-1], hypers, average=average[:1])
    got = [*run(rule, arrays, hypers | {"average": average}), average]
    for name, g, (w,), (b,) in zip([*names_of(rule), "average"], got, exact, bounds, strict=True):
        g64 = g.astype(np.float64)
        if g.dtype != DTYPES["bfloat16"]:
            assert (np.abs(g64 - w) <= b).all(), name
            continue
        ulp = 2.0 ** (np.floor(np.log2(abs(w))) - 7)
        assert (np.abs(g64 - w) < ulp).all(), name
        # Five deviations of a mean of so many, beside what was rounded before it was stored.
        up = (w / ulp) % 1
        assert abs(g64.mean() - w) <= ulp * 5 * np.sqrt(up * (1 - up) / n) + b - STORAGE["bfloat16"] * abs(w), name


def test_stochastic_bits_depend_on_seed_and_element_alone(isa):
    def rounded(seed, n=40000, offset=0):
        arrays = [a[offset:].copy() for a in random_case("adam", "bfloat16", n)]
        return run("adam", arrays, own_hypers("adam") | {"seed": seed})[0]

    assert rounded(1).tobytes() == rounded(1).tobytes()
    assert rounded(1)[:20000].tobytes() != rounded(2)[:20000].tobytes()
    # The seed's upper half counts, and neighbours are not the same bits moved on by one.
    assert rounded(1).tobytes() != rounded(1 + 2**40).tobytes()
    flips = [(rounded(s) != rounded(0)) for s in (1, 2, 3)]
    for a, b in ((0, 1), (1, 2)):
        same = np.mean(flips[a] == flips[b])
        assert 0.4 < same < 0.9
    assert rounded(1)[5:].tobytes() != rounded(1, offset=5).tobytes()


@pytest.mark.parametrize("fraction", [1 / 2, 1 / 3, 1 / 64])
def test_random_bits_are_independent_of_element_tensor_and_seed(fraction):
    """Every tensor of a step comes to 1 - fraction*ULP, which is rounded up to 1 with probability 1 - fraction."""
    seeds, n = 256, 1 << 13
    x = fraction * 2.0**-8
    hypers = {"lr": 0, "beta1": 1 - x, "beta2": 1 - x, "step": 1, "decay_lr": 1, "weight_decay": x, "ema_momentum": 0}
    up = np.empty((seeds, 5, n))
    for seed in range(seeds):
        param, m, v, average = np.ones((4, n), DTYPES["bfloat16"])
        vhat, grad = np.zeros((2, n), DTYPES["bfloat16"])
        run("amsgrad", [param, m, v, vhat, grad], hypers | {"average": average, "seed": seed})
        up[seed] = [a == 1 for a in (m, v, vhat, param, average)]
    z = (up - (1 - fraction)) / np.sqrt(fraction * (1 - fraction))

    def deviations(samples, axis=None):
        """How many of its deviations a mean of independent samples of mean 0 and variance 1 is away from 0."""
        return np.abs(samples.mean(axis) * np.sqrt(samples.size if axis is None else samples.shape[axis])).max()

    assert deviations(z, axis=0) < 6  # of 40960 pairs of a tensor and an element
    assert deviations(z, axis=2) < 5
    for k in range(5):
        for other in range(k):
            assert deviations(z[:, k] * z[:, other]) < 4.5, (k, other)
        for lag in (1, 2, 3, 4, 8, 16, 64, 1024):
            assert deviations(z[:, k, lag:] * z[:, k, :-lag]) < 4.5, ("element", k, lag)
        for lag in (1, 2, 16, 128):
            assert deviations(z[lag:, k] * z[:-lag, k]) < 4.5, ("seed", k, lag)


def test_a_small_decay_of_bfloat16_is_kept_on_average(isa):
    """1e-5 a step is a 400th of an ULP: to nearest it is lost for ever, stochastically it is e^-0.01 in 1000 steps."""
    for seed, want in ((None, 1.0), (0, np.exp(-0.01))):
        param, grad = np.ones((2, 1 << 14), DTYPES["bfloat16"]) * np.array([[1], [0]], DTYPES["bfloat16"])
        for step in range(1000):
            more = {} if seed is None else {"seed": seed + step}
            run("sgd", [param, grad], {"lr": 1e-3, "weight_decay": 1e-2, **more})
        # A step goes down by an ULP of 2^-8, or stays, and 1e-5 on average: a variance of 1e-5 * 2^-8. Six deviations.
        deviation = np.sqrt(1000 * 1e-5 * 2.0**-8 / param.size)
        assert abs(param.astype(np.float64).mean() - want) < (1e-12 if seed is None else 6 * deviation)


def test_zero_stays_zero_under_stochastic_rounding(isa):
    param = np.zeros(4096, DTYPES["bfloat16"])
    run("sgd", [param, np.zeros_like(param)], {"lr": 0.1, "proximal_l1": 0.1, "seed": 3})
    assert not param.any()


@dtypes
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 16384, 40001])
def test_norms_match_the_oracle_and_have_the_same_bits_everywhere(dtype, size):
    param, accumulator, grad = random_case("momentum", dtype, size)
    hypers = {"grad_scale": 0.5, "accumulation_scale": 0.25, "l1": 0.3, "l2": 0.2}
    for more in ({}, {"param": param}, {"accumulator": accumulator}, {"param": param, "accumulator": accumulator}):
        results = []
        for name in wdops.isa.available():
            wdops.isa.use(name)
            results.append(wdops.kernels.norm(grad, **more, **hypers))
        wdops.isa.use(wdops.isa.available()[0])
        assert len(set(results)) == 1
        want = reference.norms(grad, more.get("param"), accumulator=more.get("accumulator"), **hypers)
        # Each term of a g is rounded four times at most: its coefficient, a product, and two sums. The sums over the
        # elements are made in double, in another order.
        terms = 0.125 * np.abs(grad.astype(np.float64))
        terms += 0.25 * np.abs(accumulator.astype(np.float64)) if "accumulator" in more else 0
        terms += 0.3 + 0.4 * np.abs(param.astype(np.float64)) if "param" in more else 0
        rounding = 4 * 2.0 ** (-53 if dtype == "float64" else -24) * np.linalg.norm(terms)
        np.testing.assert_allclose(results[0][0], float(want.norm[0]), rtol=1e-12, atol=rounding)
        np.testing.assert_allclose(results[0][1], float(want.penalty[0]), rtol=1e-12)
        assert results[0][2] is True


@dtypes
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("where", [0, 64, 16390, 20000])
def test_norms_find_what_is_not_finite(dtype, bad, where, isa):
    grad = np.ones(20001, DTYPES[dtype])
    assert wdops.kernels.norm(grad)[2] is True
    grad[where] = bad
    norm, _, finite = wdops.kernels.norm(grad)
    assert finite is False and not np.isfinite(norm)


def test_squares_do_not_overflow(isa):
    for dtype, value in (("float16", 6e4), ("float32", 3e38), ("bfloat16", 3e38)):
        grad = np.full(1000, value, DTYPES[dtype])
        norm, _, finite = wdops.kernels.norm(grad)
        assert finite and norm == pytest.approx(float(grad[0]) * np.sqrt(1000))


def test_a_dtype_of_slots_that_does_not_go_with_the_param_is_refused():
    for param, slot in (("float64", "float32"), ("float32", "float16"), ("float32", "float64")):
        arrays = random_case("adam", param, 8, slot_dtype=slot)
        with pytest.raises(ValueError, match=f"m has dtype {slot}, but param has {param}"):
            run("adam", arrays, own_hypers("adam"))


@pytest.mark.parametrize("rule", [rule for rule in reference.RULES if rule not in WHOLE])
@dtypes
@pytest.mark.parametrize("decay", ["all", "none"])
def test_every_size_and_offset_is_a_piece_of_the_whole(rule, dtype, decay, isa):
    hypers = own_hypers(rule) | DECAYS[decay]
    start = random_case(rule, dtype, N)
    whole = run(rule, [a.copy() for a in start], hypers)
    for n in SIZES:
        for offset in OFFSETS:
            arrays = [a.copy() for a in start]
            run(rule, [a[offset : offset + n] for a in arrays], hypers)
            for array, old, new in zip(arrays[:-1], start[:-1], whole, strict=True):
                want = old.copy()
                want[offset : offset + n] = new[offset : offset + n]
                assert array.tobytes() == want.tobytes(), (n, offset)


@pytest.mark.parametrize("rule", sorted(WHOLE))
@dtypes
def test_every_size_and_offset_of_a_rule_with_norms_matches_the_oracle(rule, dtype):
    hypers = own_hypers(rule) | TERMS
    for n in [*SIZES, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 65]:
        start = random_case(rule, dtype, n, seed=n)
        want, bound = oracle(rule, start[0], start[1:-1], start[-1], hypers)
        first = None
        for name in wdops.isa.available():
            wdops.isa.use(name)
            for offset in OFFSETS:
                arrays = [np.concatenate([np.ones(offset, a.dtype), a, np.ones(8, a.dtype)]) for a in start]
                got = run(rule, [a[offset : offset + n] for a in arrays], hypers)
                assert all((a[:offset] == 1).all() and (a[offset + n :] == 1).all() for a in arrays), (n, offset)
                first = first or got
                assert bits(got) == bits(first), (n, name, offset)
        wdops.isa.use(wdops.isa.available()[0])
        for name, g, w, b in zip(names_of(rule), first, want, bound, strict=True):
            assert_within(g, w, b, f"{name} of {n}")


def special_case(rule, dtype):
    """All pairs of special values as param and grad, on random slots and on special ones."""
    info = {"bfloat16": 2.0**-126, "float16": 2.0**-14, "float32": 2.0**-126, "float64": 2.0**-1022}
    tiny = info[dtype]
    values = [0.0, -0.0, 1.0, -1.0, 1e-3, np.inf, -np.inf, np.nan, tiny, -tiny, tiny / 4, 3e4]
    values = np.array(values).astype(DTYPES[dtype])
    param, grad = (x.ravel() for x in np.meshgrid(values, values))
    slots = random_case(rule, dtype, param.size)[1:-1]
    special = [np.roll(np.abs(param) if name.startswith("v") else param, 5) for name in reference.RULES[rule].slots]
    return [
        np.concatenate([param, param]),
        *(np.concatenate([s, t]) for s, t in zip(slots, special, strict=True)),
        np.concatenate([grad, grad]),
    ]


@rules
@dtypes
@pytest.mark.parametrize("decay", ["all", "none"])
def test_every_instruction_set_gives_the_same_bits(rule, dtype, decay):
    hypers = own_hypers(rule) | DECAYS[decay]
    results = {}
    for name in wdops.isa.available():
        wdops.isa.use(name)
        parts = []
        for arrays in (random_case(rule, dtype, N), special_case(rule, dtype)):
            for _ in range(3):
                run(rule, arrays, hypers)
            parts += bits(arrays)
        results[name] = parts
    wdops.isa.use(wdops.isa.available()[0])
    first = results.pop("baseline")
    for name, parts in results.items():
        assert parts == first, name


@rules
@dtypes
@pytest.mark.parametrize("decay", ["all", "none"])
@np.errstate(all="ignore")
def test_special_values_match_the_oracle(rule, dtype, decay, isa):
    hypers = own_hypers(rule) | DECAYS[decay]
    arrays = special_case(rule, dtype)
    # An infinite moment makes a NaN of an infinite gradient, here as in Keras: both form grad - m. The oracle does not.
    for slot in arrays[1:-1]:
        slot[~np.isfinite(slot)] = 2.0
    info = np.finfo(np.float32) if dtype != "float64" else np.finfo(np.float64)
    # A subnormal counts as 0 where it is computed with.
    flushed = [np.where(np.abs(a.astype(np.float64)) < info.tiny, 0, a.astype(np.float64)) for a in arrays]
    flushed = [f.astype(a.dtype) for f, a in zip(flushed, arrays, strict=True)]
    want, bound = oracle(rule, flushed[0], flushed[1:-1], flushed[-1], hypers)
    # What underflows in a product of the least numbers is 0 here and not in the oracle, and a rule may ask its sign.
    wide = [f.astype(np.float64) for f in flushed]
    usual = np.all([(f == 0) | ~(np.abs(f) < 1e6 * info.tiny) for f in wide], axis=0)
    got = run(rule, arrays, hypers)
    for name, g, w, b in zip(names_of(rule), got, want, bound, strict=True):
        # 0 times inf is NaN in the oracle, which multiplies by every coefficient; a term that is off makes no NaN.
        g64 = g.astype(np.float64)
        invented = np.isnan(g64) & ~np.isnan(w)
        assert not invented.any(), (name, g[invented][:4])
        if decay == "all":
            assert (np.isnan(g64) == np.isnan(w)).all(), name
        finite = np.isfinite(g64) & np.isfinite(w) & usual
        assert (np.abs(g64 - w) <= b)[finite].all(), name


def power_of(v, lr_power):
    """v^-lr_power: one rounding away, since ftrl_power with z = -1 and no gradient gives 1/v^-lr_power."""
    n = len(v)
    param, z, grad = np.zeros(n, np.float32), np.full(n, -1, np.float32), np.zeros(n, np.float32)
    run("ftrl_power", [param, v.copy(), z, grad], {"lr": 1.0, "lr_power": lr_power})
    with np.errstate(divide="ignore"):
        return 1 / param.astype(np.float64)


@pytest.mark.parametrize("lr_power", [-1e-3, -0.25, -0.5, -0.6, -0.8, -0.99, 0.5, -3.0, -8.0])
def test_a_power_is_accurate_over_all_accumulators(lr_power, isa):
    every_exponent = np.random.default_rng(0).integers(0x00800000, 0x7F800000, 1 << 18, np.uint32).view(np.float32)
    near_1 = np.linspace(0.5, 2, 1 << 17, dtype=np.float32)
    v = np.concatenate([every_exponent, near_1])
    power = -np.float64(np.float32(lr_power))
    with np.errstate(over="ignore"):
        want = v.astype(np.float64) ** power
    inside = (want > 2.0**-125) & (want < 2.0**125)  # and so is its inverse, which is seen
    v, want = v[inside], want[inside]
    assert len(v) > 1 << 15
    # In ULPs of the power: what Pow says, and the rounding of the inverse.
    ulp = 2.0 ** (np.floor(np.log2(want)) - 23)
    error = np.abs(power_of(v, lr_power) - want) / ulp
    assert error.max() < (0.63 if abs(power) <= 1 else 0.82) + 1
    assert error.mean() < 0.6


@pytest.mark.parametrize("lr_power", [-0.6, -3.0, 0.0, 0.5])
def test_a_power_of_a_special_value(lr_power, isa):
    """The new param is 1/(1 + v^-lr_power); an infinite v is that of test_special_values_match_the_oracle."""
    v = np.array([0, -0.0, 1, 2.0**-127, 3e38, 2.0**-126, -1, -np.inf, np.nan], np.float32)
    n = len(v)
    param, z, grad = np.zeros(n, np.float32), np.full(n, -1, np.float32), np.zeros(n, np.float32)
    run("ftrl_power", [param, v.copy(), z, grad], {"lr": 1.0, "lr_power": lr_power, "beta": 1.0})
    flushed = np.where(np.abs(v) < 2.0**-126, 0, v).astype(np.float64)
    with np.errstate(all="ignore"):
        power = np.where(flushed >= 0, np.abs(flushed) ** -np.float64(np.float32(lr_power)), np.nan)
        want = np.where(power < 2.0**-126, 1, np.where(power >= 2.0**128, np.nan, 1 / (1 + power)))
    # Where the power of both accumulators is infinite, their difference is NaN, as the oracle's.
    np.testing.assert_allclose(param, want, rtol=3e-7)


@rules
@dtypes
def test_a_nan_stays(rule, dtype, isa):
    """In whatever it is, it reaches the param; and no slot loses it."""
    names = ["param", *reference.RULES[rule].slots, "grad"]
    for name in names:
        arrays = random_case(rule, dtype, 40)
        arrays[names.index(name)][:] = np.nan
        got = run(rule, arrays, own_hypers(rule))
        assert np.isnan(got[0]).all(), name
        if name != "grad":
            assert np.isnan(got[names.index(name)]).all(), name


@dtypes
def test_a_term_that_is_off_leaves_an_infinite_param_as_it_is(dtype, isa):
    param = np.array([np.inf, -np.inf], DTYPES[dtype])
    run("sgd", [param, np.ones(2, DTYPES[dtype])], {"lr": 0.1})
    assert param.tolist() == [np.inf, -np.inf]


@dtypes
def test_proximal_zeros_are_exact(dtype, isa):
    param = np.array([0.1, -0.1, 0.3, -0.3, 0.0, -0.0, np.nan], DTYPES[dtype])
    run("sgd", [param, np.zeros(7, DTYPES[dtype])], {"lr": 0.5, "proximal_l1": 0.4})
    assert param[[0, 1, 4, 5]].tobytes() == np.zeros(4, DTYPES[dtype]).tobytes()
    assert (np.abs(param[[2, 3]].astype(float)) > 0.09).all()
    assert np.isnan(param[6])


@dtypes
def test_the_penalty_of_zero_is_flat(dtype, isa):
    param = np.zeros(3, DTYPES[dtype])
    run("sgd", [param, np.zeros(3, DTYPES[dtype])], {"lr": 0.1, "l1": 1.0, "l2": 1.0})
    assert not param.any()


def test_l2_and_weight_decay_differ_for_adam():
    """The negative control: were decoupled decay coupled, as others shipped it, this would fail."""
    results = []
    for decay in ({"l2": 0.2}, {"weight_decay": 0.4}):
        arrays = random_case("adam", "float32", 100)
        results.append(run("adam", arrays, own_hypers("adam") | decay)[0])
    assert np.median(np.abs(results[0] - results[1])) > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_rounded_to_nearest_even(dtype, isa):
    """Every 16-bit value passes through a step that changes nothing, and every midpoint goes where NumPy puts it."""
    every = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype])
    param = every.copy()
    run("sgd", [param, np.zeros_like(param)], {"lr": 0.0})
    with np.errstate(all="ignore"):
        as_float = every.astype(np.float32)
        flushed = np.where(np.abs(as_float) < 2.0**-126, 0, as_float).astype(DTYPES[dtype])
    same = (param == flushed) | (np.isnan(param) & np.isnan(flushed))
    assert same.all()

    finite = np.sort(every[np.isfinite(every.astype(np.float32))].astype(np.float32))
    finite = finite[np.abs(finite) < 2.0**15]
    low, high = finite[:-1], finite[1:]
    # high - (high - low)/2 is the midpoint, exact in float32, and stored by rounding to even.
    param = high.astype(DTYPES[dtype])
    grad = (high - low).astype(DTYPES[dtype])
    exact = grad.astype(np.float32) == high - low
    run("sgd", [param, grad], {"lr": 0.5})
    with np.errstate(all="ignore"):
        want = (high - np.float32(0.5) * grad.astype(np.float32)).astype(DTYPES[dtype])
    normal = exact & (np.abs(high) > 2.0**-120) & (np.abs(grad.astype(np.float32)) > 2.0**-120)
    assert normal.sum() > 30000
    assert (param[normal] == want[normal]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "adamx"}, "rule is 'adamx'"),
        ({"grad": np.zeros(4, np.float64)}, "grad has dtype float64, but param has float32"),
        ({"grad": np.zeros(5, np.float32)}, "grad has 5 elements, but param has 4"),
        ({"slots": [np.zeros(4, np.float32)]}, "adam has 2 slots, not 1"),
        ({"slots": [np.zeros(8, np.float32)[::2], np.zeros(4, np.float32)]}, "m must be contiguous"),
        ({"param": np.zeros(17, np.uint8)[1:].view(np.float32)}, "param must be contiguous and aligned"),
        ({"param": np.zeros(4, np.int32)}, "param has dtype int32"),
        ({"hypers": {"l1": -0.1}}, "l1 is -0.1"),
        ({"hypers": {"l2": float("nan")}}, "l2 is nan"),
        ({"hypers": {"step": 0}}, "step is 0"),
        ({"hypers": {"lr": float("nan")}}, "lr is nan, but must be finite"),
        ({"hypers": {"lr": float("inf")}}, "lr is inf, but must be finite"),
        ({"hypers": {"l1": float("inf")}}, "l1 is inf, but must be finite"),
        ({"hypers": {"l1": -1e-9}}, "l1 is -1e-09, but must be at least 0"),
        ({"hypers": {"lr": -1.0, "proximal_l2": 1.0}}, "lr is -1, but must not be negative beside proximal"),
        ({"hypers": {"lr": -1.0, "proximal_l1": 1.0}}, "lr is -1, but must not be negative beside proximal"),
    ],
)
def test_a_bad_array_is_named_and_nothing_changes(change, message):
    arguments = {"rule": "adam", "param": np.ones(4, np.float32), "grad": np.ones(4, np.float32)}
    arguments["slots"] = [np.ones(4, np.float32) for _ in range(2)]
    arguments |= {k: v for k, v in change.items() if k != "hypers"}
    watched = [arguments["param"], *arguments["slots"]]
    before = [a.copy() for a in watched]
    hypers = {"lr": 0.1, "step": 1} | change.get("hypers", {})
    with pytest.raises(ValueError, match=message):
        wdops.kernels.apply(**arguments, **hypers)
    assert all((a == b).all() for a, b in zip(watched, before, strict=True))


def test_overlapping_and_read_only_arrays_are_refused():
    memory = np.ones(8, np.float32)
    with pytest.raises(ValueError, match="grad shares memory"):
        run("sgd", [memory[:4], memory[2:6]], {"lr": 0.1})
    memory.flags.writeable = False
    with pytest.raises(ValueError, match="param must be writeable"):
        run("sgd", [memory, np.ones(8, np.float32)], {"lr": 0.1})
    assert (memory == 1).all()
