"""Log-mel spectrograms against TensorFlow's, and by what they must show."""

import numpy as np
import pytest

from clients.tasks.spectrogram import log_mel, mel_bank
from clients.tensorflow.setup import tf


def tone(frequency, amplitude=3000.0):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(16000) / 16000)).astype(np.int16)


@pytest.mark.parametrize(
    "parameters", [(40, 257, 16000, 20.0, 8000.0), (64, 513, 22050, 125.0, 7500.0)]
)
def test_the_mel_bank_is_tensorflows(parameters):
    theirs = tf.signal.linear_to_mel_weight_matrix(*parameters, dtype=tf.float64)
    np.testing.assert_allclose(mel_bank(*parameters), theirs, atol=1e-10)


def test_a_spectrogram_is_tensorflows():
    clip = np.random.default_rng(0).integers(-3000, 3000, 16000).astype(np.int16)
    spectrum = tf.signal.stft(tf.cast(clip, tf.float32) / 32768, 400, 160, fft_length=512)
    bank = tf.signal.linear_to_mel_weight_matrix(40, 257, 16000, 20.0, 8000.0)
    theirs = tf.math.log(tf.abs(spectrum) ** 2 @ bank + 1e-6)
    ours = log_mel(clip)
    assert (ours.shape, ours.dtype) == ((98, 40, 1), np.float32)
    np.testing.assert_allclose(ours[..., 0], theirs, atol=1e-4)


@pytest.mark.parametrize("frequency", [300, 1000, 3000, 6000])
def test_a_tone_peaks_in_the_bin_whose_centre_is_nearest(frequency):
    def mel(hertz):
        return 2595 * np.log10(1 + hertz / 700)

    centres = mel(20) + (mel(8000) - mel(20)) * np.arange(1, 41) / 41
    nearest = np.abs(centres - mel(frequency)).argmin()
    assert set(log_mel(tone(frequency))[..., 0].argmax(1)) == {nearest}


def test_silence_is_the_floor_and_twice_the_amplitude_four_times_the_energy():
    np.testing.assert_allclose(log_mel(np.zeros(16000, np.int16)), np.log(1e-6), rtol=1e-6)
    louder = log_mel(tone(1000, 6000)).max() - log_mel(tone(1000, 3000)).max()
    assert louder == pytest.approx(np.log(4), abs=1e-3)


def test_a_sound_shows_in_the_frames_of_its_time_only():
    clip = np.zeros(16000, np.int16)
    clip[8000:8160] = tone(1000)[:160]
    loud = np.flatnonzero(log_mel(clip).max(axis=(1, 2)) > -5)
    # Frames of 400 samples begin every 160: number 48 ends at 8080, number 50 begins at 8000.
    assert set(loud) <= {48, 49, 50}
    assert 49 in loud
