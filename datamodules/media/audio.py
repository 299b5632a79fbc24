"""WAV, FLAC and Ogg to one channel at 16 kHz, read block by block."""

import io
import math

import numpy as np
import soundfile

from datamodules.media.limits import DecodeLimits, check_format, require

SAMPLE_RATE = 16_000
AUDIO_FORMATS = {"wav": b"RIFF", "flac": b"fLaC", "ogg": b"OggS"}
SAMPLE_RATES = (1_000, 192_000)  # Hz
MAX_RATE_RATIO = 50_000  # of the fraction rate / 16 kHz, in lowest terms: the filter that resamples is 20 times as long
MAX_CHANNELS = 16
MAX_SAMPLES = 100_000_000  # of all channels together: 3 minutes at 48 kHz and 11 channels
MAX_PEAK = 100.0  # times full scale; a louder sound was never scaled to [-1, 1], and its power may overflow
BLOCK_FRAMES = 65_536  # of a sound that are read at a time


def decode_audio(data: bytes, format: str, limits: DecodeLimits) -> np.ndarray:
    """WAV, FLAC or Ogg to float32 (samples,), mono, 16 kHz, in [-1, 1]."""
    check_format("audio", format, AUDIO_FORMATS)
    require(data.startswith(tuple(AUDIO_FORMATS.values())), f"this {format} begins with {data[:4]!r}", "unknown format")
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        rate = file.samplerate
        _check_sound(file, limits)
        wave = _mono(file)
    if rate != SAMPLE_RATE:
        from scipy.signal import resample_poly

        divisor = math.gcd(rate, SAMPLE_RATE)
        wave = resample_poly(wave, SAMPLE_RATE // divisor, rate // divisor)
    return np.ascontiguousarray(wave, dtype=np.float32)


def _check_sound(file: soundfile.SoundFile, limits: DecodeLimits) -> None:
    rate, channels, num_samples = file.samplerate, file.channels, file.frames * file.channels
    low, high, seconds, longest = *SAMPLE_RATES, file.frames / file.samplerate, limits.max_audio_seconds
    require(low <= rate <= high, f"this audio is sampled at {rate} Hz; allowed: {low} to {high}", "sample rate")
    ratio = rate // math.gcd(rate, SAMPLE_RATE)
    require(ratio <= MAX_RATE_RATIO, f"this audio's {rate} Hz have no small ratio to {SAMPLE_RATE} Hz", "sample rate")
    require(
        channels <= MAX_CHANNELS, f"this audio has {channels} channels; allowed: at most {MAX_CHANNELS}", "too many channels"
    )
    require(seconds > 0, "this audio lasts 0.0 s", "no sound")
    require(seconds <= longest, f"this audio lasts {seconds:.1f} s; allowed: at most {longest} s", "too long")
    require(num_samples <= MAX_SAMPLES, f"this audio has {num_samples} samples; allowed: at most {MAX_SAMPLES}", "too long")


def _mono(file: soundfile.SoundFile) -> np.ndarray:
    """The mean of the channels, read block by block: all of them at once may take gigabytes."""
    wave = np.empty(file.frames, dtype=np.float32)
    for start in range(0, len(wave), BLOCK_FRAMES):
        wanted = min(BLOCK_FRAMES, len(wave) - start)
        block = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
        require(len(block) == wanted, f"this audio ends after {start + len(block)} of {len(wave)} frames", "does not decode")
        peak = float(np.abs(block).max())
        require(math.isfinite(peak), "this audio holds values that are not finite", "not finite")
        require(peak <= MAX_PEAK, f"this audio reaches {peak:g} times full scale; allowed: at most {MAX_PEAK:g}", "too loud")
        wave[start : start + wanted] = block
    return wave
