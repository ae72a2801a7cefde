"""The landscape's measures, on functions whose answers are known."""

import numpy as np
import pytest
import torch
from tiny_runs import tiny

from shift.build import build_model, build_task
from shift.config import ModelConfig, TaskConfig
from shift.landscape.cuts import cut, fit
from shift.landscape.hessian import Hessian, LossSurface
from shift.landscape.hopping import hopping
from shift.landscape.information import effective_rank, matrix_entropy, mutual_information, phases
from shift.landscape.spectrum import Spectrum, exact_spectrum, lanczos_spectrum
from shift.landscape.valley import exponent, sensitivity, split, threshold
from shift_kernels import ShiftInputError


def quadratic(values, seed=0, dtype=torch.float64):
    """w^T H w / 2 with the eigenvalues given; also H and its eigenvectors."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values),) * 2))[0]
    h = torch.from_numpy((basis * values) @ basis.T).to(dtype)
    return (lambda w: w @ h @ w / 2), h, basis


def surface(n_loops, **options):
    """A looped attention model of 250 parameters, and its weights."""
    config = tiny(
        task=TaskConfig("markov", options={"vocab": 4, "length": 6}),
        model=ModelConfig(n_loops=3, d_model=4, n_heads=2, d_ff=0, injection="none"),
    )
    task = build_task(config)
    model = build_model(config, task)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return LossSurface(model, task.batch(4, 0), n_loops, **options), weights


VALUES = np.array([9.0, 4.0, 1.0, 0.3, 1e-3, 0.0, -1e-3, -2.0])


@pytest.mark.parametrize("method", ["double_backward", "finite_difference"])
def test_products_with_a_known_matrix_are_right(method):
    function, h, _ = quadratic(VALUES)
    hessian = Hessian(function, torch.ones(8, dtype=torch.float64), method)
    v = torch.arange(8.0, dtype=torch.float64)
    torch.testing.assert_close(hessian.matvec(v), h @ v, atol=1e-7, rtol=1e-7)
    np.testing.assert_allclose(hessian.dense(chunk=3), h, atol=1e-7)


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_both_ends_of_a_known_spectrum_are_found(end):
    function, h, _ = quadratic(VALUES)
    values, vectors = Hessian(function, torch.zeros(8, dtype=torch.float64)).extreme(3, end)
    expected = VALUES[:3] if end == "top" else VALUES[::-1][:3]
    np.testing.assert_allclose(values, expected, atol=1e-6)
    np.testing.assert_allclose(h.numpy() @ vectors, vectors * values, atol=1e-5)


@pytest.mark.parametrize("n_loops", [1, 3])
def test_the_ends_agree_with_the_exact_spectrum_of_a_model_to_1e_6(n_loops):
    loss, weights = surface(n_loops)
    hessian = Hessian(loss.loss, loss.vector(weights))
    exact = exact_spectrum(hessian).values
    np.testing.assert_allclose(hessian.extreme(5)[0], exact[:5], atol=1e-6)
    np.testing.assert_allclose(hessian.extreme(5, "bottom")[0], exact[::-1][:5], atol=1e-6)


def test_the_dense_matrix_is_the_derivative_of_the_gradient():
    loss, weights = surface(3)
    w = loss.vector(weights)
    numeric = Hessian(loss.loss, w, "finite_difference")
    exact = Hessian(loss.loss, w).dense()
    np.testing.assert_allclose(exact, numeric.dense(), atol=1e-5 * np.abs(exact).max())


def test_float32_is_as_good_as_float32_can_be():
    double, weights = surface(3)
    single, _ = surface(3, dtype=torch.float32)
    spectra = [exact_spectrum(Hessian(s.loss, s.vector(weights))).values for s in (double, single)]
    np.testing.assert_allclose(*spectra, atol=1e-5 * np.abs(spectra[0]).max())


def test_finite_differences_serve_where_a_kernel_has_no_double_backward():
    exact, weights = surface(3)
    fused, _ = surface(3, dtype=torch.float32, backend="auto")
    v = torch.randn(exact.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = Hessian(exact.loss, exact.vector(weights)).matvec(v)
    found = Hessian(fused.loss, fused.vector(weights), "finite_difference").matvec(v)
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_the_loss_is_the_trainers_loss():
    loss, weights = surface(2)
    names = list(loss.slices())
    assert loss.slices()[names[-1]].stop == loss.size == len(weights)
    step = 1e-6 * torch.ones(loss.size, dtype=torch.float64)
    w = loss.vector(weights)
    rise = loss.loss(w + step) - loss.loss(w - step)
    assert rise.item() == pytest.approx(2 * float(loss.gradient(w) @ step), rel=1e-6)


def test_a_lanczos_density_counts_what_the_exact_spectrum_counts():
    loss, weights = surface(3)
    hessian = Hessian(loss.loss, loss.vector(weights))
    exact, density = exact_spectrum(hessian), lanczos_spectrum(hessian, 60, 8)
    assert density.size == pytest.approx(exact.size)
    assert density.values[0] == pytest.approx(exact.values[0], rel=1e-6)
    for eps in (1e-1, 1e-2):
        ours, theirs = split(density, eps * exact.values[0]), split(exact, eps * exact.values[0])
        assert ours.valley == pytest.approx(theirs.valley, rel=0.35)
        assert ours.river == pytest.approx(theirs.river, rel=0.1)
    assert matrix_entropy(density) == pytest.approx(matrix_entropy(exact), rel=0.1)


def test_a_lanczos_density_ends_where_the_krylov_space_does():
    function, _, _ = quadratic(np.array([3.0, 3.0, 3.0, 1.0]))
    density = lanczos_spectrum(Hessian(function, torch.zeros(4, dtype=torch.float64)), 4, 1)
    np.testing.assert_allclose(density.values, [3, 1], atol=1e-9)


KNOWN = Spectrum(VALUES, np.ones(8))


def test_the_split_counts_walls_river_and_saddle():
    found = split(KNOWN, 0.1)
    assert (found.valley, found.river, found.saddle) == (4, 3, 1)
    assert found.condition == pytest.approx(30)
    assert found.force == pytest.approx(1 / 9 + 1 / 4 + 1 + 1 / 0.3)


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [("absolute", 0.5, 0.5), ("relative", 0.5, 4.5), ("gap", 1e-6, 0.3**0.5 * 1e-3**0.5)],
)
def test_each_rule_draws_the_line_where_it_says(rule, value, expected):
    assert threshold(KNOWN, rule, value) == pytest.approx(expected)


def test_a_condition_number_that_is_the_thresholds_own_shows_as_such():
    dense = Spectrum(np.logspace(0, -6, 601), np.ones(601))
    gapped = Spectrum(np.r_[[2.0, 1.0], np.full(99, 1e-9)], np.ones(101))
    assert exponent(sensitivity(dense), "condition") == pytest.approx(-1, abs=0.05)
    assert exponent(sensitivity(gapped), "condition") == pytest.approx(0)


def test_a_valley_of_nothing_is_refused_or_empty():
    flat = Spectrum(np.array([-1.0, -2.0]), np.ones(2))
    with pytest.raises(ShiftInputError, match="absolute"):
        threshold(flat)
    found = split(flat, 0.1)
    assert (found.valley, found.condition, found.force) == (0, None, 0)


def test_entropy_is_log_n_of_n_equal_curvatures_whatever_their_signs():
    assert matrix_entropy(Spectrum(np.array([2.0, -2.0, 2.0, 2.0]), np.ones(4))) == pytest.approx(np.log(4))
    assert effective_rank(Spectrum(np.array([2.0, 0.0]), np.array([3.0, 50.0]))) == pytest.approx(3)
    assert effective_rank(Spectrum(np.zeros(2), np.ones(2))) == 1


def test_mutual_information_is_the_matrix_formulas():
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(2):
        x = rng.standard_normal((10, 10))
        pairs.append(np.linalg.eigh(x + x.T))

    def normalised(values, vectors):
        a = (vectors * np.abs(values)) @ vectors.T
        return a / np.sqrt(np.outer(a.diagonal(), a.diagonal())) / len(a)

    def entropy(a):
        p = np.linalg.eigvalsh(a)
        return -(p * np.log(p)).sum()

    a, b = (normalised(*pair) for pair in pairs)
    assert mutual_information(*pairs) == pytest.approx(entropy(a) + entropy(b) - entropy(a * b * len(a)))


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (
            [50, 20, 10, 30, 60, 61, 60, 62],
            {"collapse": (0, 2), "diversification": (2, 4), "stabilisation": (4, 7)},
        ),
        ([10, 10.5, 9.9, 10.2], {"stabilisation": (0, 3)}),
        ([40, 30, 20, 10], {"collapse": (0, 3)}),
        ([10, 20, 30, 40], {"diversification": (0, 3)}),
        ([3], {}),
    ],
)
def test_phases_are_found_by_their_rule(rank, expected):
    assert phases(rank) == expected


def stretch(rate, n_steps=16):
    """Gradient descent on a quadratic with one steep wall, at ``rate`` times the critical step for it."""
    _, h, basis = quadratic(np.r_[10.0, np.full(39, 1e-3)], seed=1)
    w = torch.from_numpy(basis @ np.r_[1.0, np.full(39, 5.0)])
    weights, gradients = [], []
    for _ in range(n_steps + 1):
        weights.append(w.numpy())
        gradients.append((h @ w).numpy())
        w = w - rate * 2 / 10 * (h @ w)
    return np.array(weights), np.array(gradients), np.array([10.0]), basis[:, :1]


def test_a_run_above_half_the_critical_step_hops_and_one_below_does_not():
    hops, glides = hopping(*stretch(0.9)), hopping(*stretch(0.2))
    assert hops.crossings == 1
    assert hops.valley_cosine == pytest.approx(-1)
    assert glides.crossings == glides.step_turns == 0
    assert glides.valley_cosine == pytest.approx(1)
    assert hops.bounce_height > 3 * glides.bounce_height
    assert hops.river_progress > 0


def test_hopping_in_the_valley_is_told_from_noise_everywhere():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((17, 400))
    basis = np.linalg.qr(rng.standard_normal((400, 5)))[0]
    everywhere = hopping(noise, noise, np.ones(5), basis)
    assert everywhere.null_mean == pytest.approx(0.5, abs=0.05)
    assert abs(everywhere.hops) < 3
    steady = 20 * rng.standard_normal(400)
    bouncing = steady - basis @ (basis.T @ steady) + np.outer((-1.0) ** np.arange(17), basis.sum(axis=1))
    inside = hopping(bouncing, bouncing, np.ones(5), basis)
    assert inside.crossings == 1
    assert inside.p_value < 0.01
    assert inside.hops > 5


@pytest.mark.parametrize(
    ("shape", "function"), [("U", lambda x: 1 + 3 * (x - 0.1) ** 2), ("V", lambda x: 1 + 3 * abs(x - 0.1))]
)
def test_a_u_and_a_v_are_told_apart_off_their_centre(shape, function):
    found = cut(function, height=2.0)
    assert found.shape == shape
    assert abs(found.margin) > 0.99
    assert (found.y[0] + found.y[-1]) / 2 - function(0) == pytest.approx(2.0, rel=0.01)


def test_a_curve_between_u_and_v_is_fitted_by_neither_with_certainty():
    x = np.linspace(-1, 1, 41)
    assert abs(fit(x, np.abs(x) ** 1.42).margin) < 0.35


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: surface(1, dtype=torch.float16), "dtype"),
        (lambda: Hessian(torch.sum, torch.zeros(3), "guess"), "method"),
        (lambda: Hessian(torch.sum, torch.zeros(3)).extreme(3), "k"),
        (lambda: lanczos_spectrum(Hessian(torch.sum, torch.zeros(3)), 0), "n_steps"),
        (lambda: threshold(KNOWN, "by eye"), "rule"),
        (lambda: split(KNOWN, 0.0), "eps"),
        (lambda: cut(lambda x: x * x, -1), "height"),
        (lambda: hopping(np.zeros((2, 3)), np.zeros((2, 3)), np.ones(1), np.eye(3)[:, :1]), "weights"),
    ],
)
def test_bad_input_is_refused_by_its_name(call, argument):
    with pytest.raises(ShiftInputError, match=f"'{argument}'|{argument}"):
        call()
