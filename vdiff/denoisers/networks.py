"""The denoisers, one per language; they differ in what the network's answer means and in their usual ``c_noise``."""

from __future__ import annotations

from torch import Tensor, nn

from vdiff.denoisers.base import NetworkDenoiser, NoiseInput
from vdiff.process import (
    EDMParameterization,
    EpsilonParameterization,
    NoiseLevel,
    VelocityParameterization,
    VParameterization,
    X0Parameterization,
    spread,
)


class EDMDenoiser(NetworkDenoiser):
    r"""EDM preconditioning: :math:`D = c_{skip}\,x_t + c_{out}\,F(c_{in}\,x_t, c_{noise})`.

    :math:`c_{in} = 1/\sqrt{\sigma^2 + \alpha^2\sigma_d^2}` keeps the input at unit variance; ``c_skip`` and
    ``c_out`` live in :class:`~vdiff.process.EDMParameterization`, in float32 whatever the network's dtype.

    Args:
        network: The :math:`F` above.
        sigma_data: Standard deviation of the data.
        c_noise, num_rows: See :class:`NetworkDenoiser`.

    References:
        Karras et al., arXiv:2206.00364, eq. 7 and table 1.
    """

    def __init__(
        self, network: nn.Module, sigma_data: float = 0.5, c_noise: NoiseInput = "log_sigma", num_rows: int = 1000
    ) -> None:
        super().__init__(network, c_noise, num_rows)
        self.sigma_data = sigma_data
        self.language = EDMParameterization(sigma_data)

    def scale_input(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        c_in = (level.sigma**2 + (level.alpha * self.sigma_data) ** 2).rsqrt()
        return x_t * spread(c_in, x_t)


class EpsilonDenoiser(NetworkDenoiser):
    """The network says the noise (Ho et al., arXiv:2006.11239). Undefined where no signal is left."""

    language = EpsilonParameterization()

    def __init__(self, network: nn.Module, c_noise: NoiseInput = "index", num_rows: int = 1000) -> None:
        super().__init__(network, c_noise, num_rows)


class VDenoiser(NetworkDenoiser):
    """The network says ``v = alpha * noise - sigma * x0`` (Salimans & Ho, arXiv:2202.00512)."""

    language = VParameterization()

    def __init__(self, network: nn.Module, c_noise: NoiseInput = "index", num_rows: int = 1000) -> None:
        super().__init__(network, c_noise, num_rows)


class VelocityDenoiser(NetworkDenoiser):
    """The network says ``d_alpha * x0 + d_sigma * noise``: flow matching (Lipman et al., arXiv:2210.02747)."""

    language = VelocityParameterization()

    def __init__(self, network: nn.Module, c_noise: NoiseInput = "time_1000", num_rows: int = 1000) -> None:
        super().__init__(network, c_noise, num_rows)


class X0Denoiser(NetworkDenoiser):
    """The network says the clean sample."""

    language = X0Parameterization()

    def __init__(self, network: nn.Module, c_noise: NoiseInput = "index", num_rows: int = 1000) -> None:
        super().__init__(network, c_noise, num_rows)
