"""Log-mel spectrograms of one-second clips, computed with numpy and scipy."""

import numpy as np
from scipy import fft, signal

from clients.trainer import NDArray

RATE = 16_000
"""The sampling rate in Hz, which is also the number of samples in a clip."""
WINDOW, HOP = 400, 160
"""The lengths of a window and of the hop to the next one in samples: 25 ms and 10 ms."""
FFT = 512
BINS, LOWEST, HIGHEST = 40, 20.0, 8000.0
"""The number of mel bins, and the frequencies in Hz between which they lie."""
FLOOR = 1e-6
"""The energy that is added before the logarithm; 16-bit rounding noise lies below it."""
FRAMES = 1 + (RATE - WINDOW) // HOP


def log_mel(clip: NDArray) -> NDArray:
    """Return the log-mel spectrogram of a clip.

    Parameters
    ----------
    clip : array, [16000] of int16
        The samples of one second at 16 kHz.

    Returns
    -------
    array, [98, 40, 1] of float32
        ``log(mel energy + 1e-6)`` by frame and mel bin. The energy is that of the power spectrum
        of samples in [-1, 1), under a periodic Hann window.
    """
    samples = clip.astype(np.float32) / np.float32(2**15)
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]
    window = signal.get_window("hann", WINDOW).astype(np.float32)
    power = np.abs(fft.rfft(frames * window, FFT)) ** 2
    bank = mel_bank(BINS, FFT // 2 + 1, RATE, LOWEST, HIGHEST).astype(np.float32)
    return np.log(power @ bank + np.float32(FLOOR))[..., None]  # type: ignore[no-any-return]


def mel_bank(bins: int, spectrum_bins: int, rate: int, lowest: float, highest: float) -> NDArray:
    """Return weights [spectrum_bins, bins] that sum a spectrum up to mel bins.

    The weights of a bin are a triangle of height 1. The corners are equally spaced on the mel scale
    (HTK's, ``1127 log(1 + f / 700)``), and the sides are straight lines on that scale.

    Parameters
    ----------
    bins : int
        The number of mel bins.
    spectrum_bins : int
        The number of bins of the spectrum, from 0 to ``rate / 2`` Hz; bin 0 has no weight.
    rate : int
        The number of samples a second.
    lowest, highest : float
        The frequencies in Hz at which the first triangle begins and the last one ends.
    """
    frequencies = _mel(np.linspace(0.0, rate / 2, spectrum_bins))[:, None]
    corners = np.linspace(_mel(lowest), _mel(highest), bins + 2)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (frequencies - left) / (centre - left)
    falling = (right - frequencies) / (right - centre)
    weights: NDArray = np.maximum(0.0, np.minimum(rising, falling))
    weights[0] = 0.0
    return weights


def _mel(frequency: float | NDArray) -> NDArray:
    return 1127.0 * np.log1p(np.asarray(frequency) / 700.0)
