"""One schedule of every sort, for truths that hold on all of them."""

from vdiff.process import (
    CosineSchedule,
    EDMSchedule,
    FlowSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    TabulatedSchedule,
    ZeroSNRSchedule,
)

SCHEDULES = {
    "edm": EDMSchedule(),
    "edm_rho_1": EDMSchedule(sigma_max=3.0, rho=1.0),
    "flow": FlowSchedule(),
    "flow_shift_3": FlowSchedule(shift=3.0),
    "flow_shift_half": FlowSchedule(shift=0.5),
    "cosine": CosineSchedule(),
    "linear": LinearSchedule(),
    "scaled_linear": ScaledLinearSchedule(),
    "zero_snr": ZeroSNRSchedule(),
    "cogvideox_2b": ZeroSNRSchedule(shift=3.0),
    "zero_snr_shift_after": ZeroSNRSchedule(shift=3.0, shift_order="after"),
    "tabulated": TabulatedSchedule(alphas_cumprod=[0.9, 0.5, 0.2, 0.0]),
    "one_row": TabulatedSchedule(betas=[0.5]),
}
