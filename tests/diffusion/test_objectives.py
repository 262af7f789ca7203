import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from graft.diffusion.objectives import Denoising, Flow, objective_for, weighted_mse
from graft.studio.errors import InputError


def latents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 3, 3, generator=generator)
    return x0, noise, torch.tensor([0, 1, 250, 700, 999])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noisy_and_target_agree_with_diffusers(kind: str):
    scheduler = DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    objective, (x0, noise, t) = objective_for(scheduler), latents()
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, t)}[kind]
    torch.testing.assert_close(objective.noisy(x0, noise, t), scheduler.add_noise(x0, noise, t), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(objective.target(x0, noise, t), target, rtol=1e-5, atol=1e-6)
    assert torch.equal(objective.timesteps(t), t)
    assert torch.equal(objective.weights(t), torch.ones(5))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_the_papers(kind: str):
    scheduler, gamma, t = DDIMScheduler(prediction_type=kind), 5.0, latents()[2]
    abar = scheduler.alphas_cumprod[t].double()
    snr = abar / (1 - abar)
    capped = torch.minimum(snr, torch.full_like(snr, gamma))
    paper = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[kind]
    torch.testing.assert_close(objective_for(scheduler, gamma).weights(t).double(), paper, rtol=1e-6, atol=0)


def test_min_snr_counts_the_x0_error_of_either_prediction_alike():
    x0, noise, t = latents()
    schedule = DDPMScheduler().alphas_cumprod
    off = x0 + 0.1 * noise.flip(0)  # a wrong guess of x0, told as epsilon and as v at the same noisy latents
    losses = {}
    for kind in ("epsilon", "v_prediction", "sample"):
        objective = Denoising(schedule, kind, 5.0)
        noisy, a = objective.noisy(x0, noise, t), schedule[t].view(-1, 1, 1, 1).sqrt()
        implied = (noisy - a * off) / (1 - a**2).sqrt()
        guess = {"epsilon": implied, "v_prediction": (a * noisy - off) / (1 - a**2).sqrt(), "sample": off}[kind]
        losses[kind] = weighted_mse(guess, objective.target(x0, noise, t), objective.weights(t))
    torch.testing.assert_close(losses["epsilon"], losses["sample"], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(losses["v_prediction"], losses["sample"], rtol=1e-2, atol=1e-5)


def test_epsilon_weight_is_finite_at_zero_terminal_snr():
    weights = Denoising(torch.tensor([0.9, 0.5, 0.0]), "epsilon", 5.0).weights(torch.tensor([0, 1, 2]))
    assert weights.tolist() == pytest.approx([5 / 9, 1, 1])


def test_flow_is_a_straight_line():
    x0, noise, _ = latents()
    objective = objective_for(FlowMatchEulerDiscreteScheduler(shift=3.0))
    sigma = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    s = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(objective.noisy(x0, noise, sigma), x0 + s * (noise - x0))
    assert torch.equal(objective.target(x0, noise, sigma), noise - x0)
    assert objective.timesteps(sigma).tolist() == [0, 250, 500, 750, 1000]
    assert torch.equal(objective.weights(sigma), torch.ones(5))


@pytest.mark.parametrize(("std", "shift"), [(None, 1.0), (None, 3.0), (1.0, 1.0), (0.5, 3.0)])
def test_flow_levels_have_the_stated_density(std: float | None, shift: float):
    draw = Flow(shift=shift, mean=0.2, std=std).levels(20_000, torch.Generator().manual_seed(1))
    unshifted = draw / (shift - (shift - 1) * draw)  # the inverse of the shift
    if std is None:
        assert unshifted.mean() == pytest.approx(0.5, abs=0.01)
        assert unshifted.var() == pytest.approx(1 / 12, abs=0.003)
    else:
        logit = torch.logit(unshifted)
        assert logit.mean() == pytest.approx(0.2, abs=0.03)
        assert logit.std() == pytest.approx(std, abs=0.03)


def test_denoising_levels_are_uniform():
    levels = Denoising(torch.linspace(0.99, 0.01, 10), "epsilon").levels(20_000, torch.Generator().manual_seed(1))
    assert torch.bincount(levels).tolist() == pytest.approx([2000] * 10, rel=0.1)


def test_cubic_levels_are_those_of_t2i_adapter():
    """t = (1 - u^3) T: a share 1 - (1 - t / T)^(1/3) of all levels is below t."""
    objective = objective_for(DDPMScheduler(), cubic=True)
    levels = objective.levels(50_000, torch.Generator().manual_seed(0))
    assert levels.min() >= 0 and levels.max() == 999 and levels.float().mean() == pytest.approx(749.5, abs=2)
    for t in (100, 500, 900):
        assert (levels < t).float().mean() == pytest.approx(1 - (1 - t / 1000) ** (1 / 3), abs=0.01)
    with pytest.raises(InputError, match="flow scheduler"):
        objective_for(FlowMatchEulerDiscreteScheduler(), cubic=True)


def test_wrong_schedulers_and_gammas_are_refused():
    with pytest.raises(InputError, match="snr_gamma = 0"):
        objective_for(DDIMScheduler(), 0.0)
    with pytest.raises(InputError, match="flow scheduler"):
        objective_for(FlowMatchEulerDiscreteScheduler(), 5.0)
    with pytest.raises(InputError, match="prediction_type 'noise'"):
        objective_for(EulerDiscreteScheduler(prediction_type="noise"))
