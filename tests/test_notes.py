"""Notes: reading, synthesis, transposition, what is kept in memory, the download."""

import math
import re
import tarfile

import click
import numpy as np
import pytest
import soundfile
import torch
from conftest import write_nsynth

import common
from common import RATE, SAMPLES, SPLITS, TIMBRES, Note, built_in_notes, load_notes, synthesise
from tests.experiments.judges import detect_pitch
from train_vae_audio import load_splits

TWO = [("flute", 60), ("guitar", 48), ("flute", 64), ("guitar", 52)]


def options(root=None, families=("flute", "guitar"), download=False):
    return {"data_root": root, "families": families and list(families), "download": download, "condition": "none"}


def sine(midi, samples=SAMPLES):
    return 0.5 * torch.sin(2 * math.pi * 440 * 2 ** ((midi - 69) / 12) * torch.arange(samples) / RATE)


def read_note(note):
    """The one window of a note, as it sounds."""
    (window,) = common.read_note(note)
    return window.float() / 32767


def note_of(path, samples=None, rate=RATE, **about):
    if samples is not None:
        soundfile.write(path, samples, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return Note(path.stem, "flute", 60, "flute_000", 100, path, **about)


def test_a_note_that_begins_with_silence_or_is_next_to_none_is_none(tmp_path):
    late, faint = np.concatenate([np.zeros(SAMPLES), sine(60).numpy()]), np.full(SAMPLES, 1.2e-5)
    assert common.read_note(note_of(tmp_path / "late.wav", late)) == [None]
    assert common.read_note(note_of(tmp_path / "faint.wav", faint)) == [None]


def test_a_note_in_nsynths_form_is_read_as_it_is(tmp_path):
    for form in ("wav", "flac"):
        waveform = read_note(note_of(tmp_path / f"a.{form}", sine(60).numpy()))
        torch.testing.assert_close(waveform, sine(60), atol=1e-4, rtol=0)


def test_other_files_are_mixed_down_resampled_and_cut_or_zero_padded(tmp_path):
    stereo = np.stack([np.full(SAMPLES, 0.2), np.full(SAMPLES, 0.4)], axis=1)
    waveform = read_note(note_of(tmp_path / "stereo.wav", stereo))
    torch.testing.assert_close(waveform, torch.full((SAMPLES,), 0.3), atol=1e-4, rtol=0)
    waveform = read_note(note_of(tmp_path / "cd.wav", sine(69, 4 * 44100).numpy(), 44100))
    expected = 69 + 12 * math.log2(44100 / RATE)  # `sine` counts its samples at RATE
    assert detect_pitch(waveform[None]).item() == pytest.approx(expected, abs=0.05)
    waveform = read_note(note_of(tmp_path / "short.wav", np.full(100, 0.1)))
    assert waveform.shape == (SAMPLES,) and not waveform[100:].any()
    assert read_note(note_of(tmp_path / "long.wav", np.full(70000, 0.1))).shape == (SAMPLES,)


def test_files_that_cannot_be_learnt_from_end_in_one_line(tmp_path):
    (tmp_path / "text.wav").write_text("this is no sound")
    note_of(tmp_path / "whole.flac", sine(60).numpy())
    whole = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    note_of(tmp_path / "silent.wav", np.zeros(SAMPLES))
    note_of(tmp_path / "empty.wav", np.zeros(0))
    note_of(tmp_path / "nan.wav", np.full(SAMPLES, np.nan))
    for name in ("missing.wav", "text.wav", "cut.flac", "silent.wav", "empty.wav", "nan.wav"):
        with pytest.raises(click.UsageError, match=name):
            read_note(note_of(tmp_path / name))


def test_transposing_moves_the_pitch_by_semitones(tmp_path):
    path = note_of(tmp_path / "a.wav", sine(60).numpy()).path
    for semitones in (-3, -1, 1, 2, 12):
        moved = read_note(note_of(path, semitones=semitones))
        assert moved.shape == (SAMPLES,)
        assert detect_pitch(moved[None]).item() == pytest.approx(60 + semitones, abs=0.05)


def test_built_in_notes_have_the_pitch_they_are_named_by_and_instruments_are_held_out():
    notes = {split: built_in_notes(split, list(TIMBRES)) for split in SPLITS}
    instruments = [{note.instrument for note in split} for split in notes.values()]
    assert not instruments[0] & instruments[1] and not instruments[1] & instruments[2]
    assert not instruments[0] & instruments[2]
    for note in notes["train"][::3]:
        waveform = synthesise(note)
        assert waveform.shape == (SAMPLES,) and waveform.abs().max() < 1.1
        assert torch.equal(waveform, synthesise(note))
        assert detect_pitch(waveform[None]).item() == pytest.approx(note.pitch, abs=0.5), note.name


def test_vibrato_sets_in_without_a_step(monkeypatch):
    """One sine with a strong vibrato: neither its phase nor its frequency jumps, at 0.3 s or elsewhere."""
    plain = common.Timbre((60, 60), rolloff=99.0, attack=1e-6, vibrato=0.3)  # rolloff: the fundamental alone
    monkeypatch.setitem(common.TIMBRES, "vocal", plain)
    part = slice(RATE // 10, 6 * RATE // 10)  # of the analytic signal of this part, windowed, the ends are left out
    waveform = synthesise(Note("a", "vocal", 60, "vocal_000", 127)).double()[part]
    spectrum = torch.fft.fft(waveform * torch.hann_window(len(waveform)))
    spectrum[len(spectrum) // 2 :] = 0
    phase = torch.from_numpy(np.unwrap(torch.fft.ifft(spectrum).angle().numpy()))
    frequency = (phase.diff() * RATE / (2 * math.pi))[RATE // 20 : -RATE // 20]  # Hz, from 0.15 to 0.55 s
    assert frequency.max() - frequency.min() > 2, "there is a vibrato"
    assert frequency.diff().abs().max() < 3, "Hz a sample: a jump of the phase would be thousands"


def test_notes_of_a_folder_are_listed_and_missing_ones_counted(tmp_path, capsys):
    root = write_nsynth(tmp_path / "n", TWO)
    folder = root / "nsynth-train" / "audio"
    (folder / "flute_acoustic_000-060-100.wav").unlink()
    (folder / "flute_acoustic_002-064-100.wav").write_text("no sound")
    splits, source = load_notes(options(root))
    assert source == "notes in NSynth's layout, folder n"
    assert splits["train"].pitch.tolist() == [64, 48, 52] and splits["train"].family.tolist() == [0, 1, 1]
    said = capsys.readouterr().out
    assert re.search(r"nsynth-train: 1 of (the )?4 notes .* missing", said)
    assert re.search(r"left out of train, 1 so far: .*flute_acoustic_002.*damaged", said)
    assert splits["train"].usable([0, 1, 2]) == [1, 1, 2] and splits["train"].left_out
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(click.UsageError, match=r"no note of flute, guitar that it lists is in audio/"):
        load_notes(options(root))


def test_notes_are_read_once_and_so_many_kept_in_16_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "KEPT", 3)
    read, real = [], common.read_note
    monkeypatch.setattr(common, "read_note", lambda note: read.append(note.pitch) or real(note))
    split = load_notes(options(write_nsynth(tmp_path / "n", TWO)))[0]["train"]
    read.clear()
    first = split.waveform(torch.tensor([0, 1, 2]))
    torch.testing.assert_close(split.waveform(torch.tensor([2, 0, 1])), first[[2, 0, 1]])
    assert torch.equal(first[1], real(split.notes[1])[0].float() / 32767)
    assert len(read) == 2 and all(kept[0].dtype == torch.int16 for kept in split.kept.values())
    for _ in range(2):
        split.waveform(torch.tensor([3, 3]))
    assert len(read) == 3 and len(split.kept) == 3
    split.waveform(torch.tensor([0]))
    split.waveform(torch.tensor([0]))
    assert len(read) == 4, "the oldest made room"


def test_transposed_notes_join_the_training_notes_with_their_own_pitch(tmp_path):
    splits, _ = load_splits(options(write_nsynth(tmp_path / "n", TWO)) | {"transpose": 1})
    assert splits["train"].pitch.tolist()[:3] == [59, 60, 61] and len(splits["test"].notes) == 4
    assert splits["train"].spread(100).tolist() == [1, 4, 7, 10] and splits["train"].spread(2).tolist() == [1, 10]
    found = detect_pitch(splits["train"].waveform(torch.tensor([0, 1, 2])))
    torch.testing.assert_close(found, torch.tensor([59.0, 60, 61]), atol=0.05, rtol=0)


def test_the_download_fetches_and_unpacks_what_is_not_there(tmp_path, monkeypatch):
    packed, root = write_nsynth(tmp_path / "official", [("flute", 60)]), tmp_path / "fetched"
    fetched = []

    def fetch(url, root, name):
        fetched.append(url)
        split = url.rsplit("nsynth-", 1)[1].split(".")[0]
        root.mkdir(exist_ok=True)
        with tarfile.open(root / name, "w:gz") as tar:
            if len(fetched) == 1:
                raise OSError("the network is gone")  # after a part of the archive was written
            tar.add(packed / f"nsynth-{split}", f"nsynth-{split}")

    monkeypatch.setattr(common, "download_url", fetch)
    with pytest.raises(click.ClickException, match="the network is gone"):
        load_notes(options(root, ["flute"], download=True))
    splits, _ = load_notes(options(root, ["flute"], download=True))
    assert [len(split.notes) for split in splits.values()] == [1, 1, 1]
    assert fetched[1:] == [common.ARCHIVES.format(split=split) for split in SPLITS]
    load_notes(options(root, ["flute"], download=True))
    assert len(fetched) == 4, "they are there"

    def broken(*_, **__):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(common, "download_url", broken)
    with pytest.raises(click.ClickException, match=r"nsynth-train.* could not be fetched into .*corrupted"):
        load_notes(options(tmp_path / "again", ["flute"], download=True))


# ---------------------------------------------------------------- One's own sounds


@pytest.mark.parametrize(
    ("name", "pitch"),
    [
        ("guitar-060-100", 60), ("bass_acoustic_000-036-127", 36), ("060-100", 60), ("C4", 60), ("piano_A#3", 58),
        ("Piano.ff.Bb2", 46), ("take 2 (C-1) G9", 127), ("guitar-200-100", -1), ("B9", -1), ("song", -1), ("c4", -1),
        ("C4 and E4", -1), ("MC4x", -1), ("track-001", -1), ("ABC4", -1), ("C4 again C4", 60)
    ],
)  # fmt: skip
def test_names_carry_pitches(name, pitch):
    assert common.pitch_of(name) == pitch


@pytest.fixture(scope="module")
def own_sounds(tmp_path_factory):
    """40 sounds of all kinds, rates and lengths, 1 to 10 s, stereo; one of 10 s is silent after 4, to 8 s."""
    root = tmp_path_factory.mktemp("own")
    for i in range(40):
        form, rate = (("mp3", 44100), ("flac", 44100), ("ogg", 22050), ("wav", 8000))[i % 4]
        seconds = (1, 2.5, 4.9, 10)[i // 4 % 4]
        waveform = sine(40 + i, int(seconds * rate)).numpy()  # `sine` counts its samples at RATE
        if i == 15:
            waveform[4 * rate : 8 * rate] = 0
        path = root / ("piano", "guitar", "flute")[i % 3] / f"C4 take {i}.{form}"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.stack([waveform, 0 * waveform], axis=1), rate)
    return root


def test_sounds_are_cut_into_windows_and_silent_ones_left_out(own_sounds):
    splits, source = load_notes(options(own_sounds, None), windows=True)
    notes = [(split, i, note) for split in splits.values() for i, note in enumerate(split.notes)]
    assert source == f"own sounds, folder {own_sounds.name}"
    assert {note.path for *_, note in notes} == {path for path in own_sounds.rglob("*") if path.is_file()}
    for _, _, note in notes:
        seconds = soundfile.info(note.path).duration
        assert note.windows == (3 if seconds > 9.9 else 1), "of 4.9 s the last 0.9 are none"
    windows = {note.window: (split, i) for split, i, note in notes if note.path.stem == "C4 take 15"}
    (first, i), (silent, j), (last, k) = (windows[w] for w in range(3))
    assert silent.example(j) is None and silent.usable([j]) != [j]
    assert first.example(i)[-RATE:].any() and last.example(k)[: 2 * RATE].any()
    assert not last.example(k)[2 * RATE :].any()
    split, i, note = next(entry for entry in notes if entry[2].path.suffix == ".mp3" and entry[2].windows == 1)
    expected = 40 + int(note.path.stem.split()[-1]) + 12 * math.log2(soundfile.info(note.path).samplerate / RATE)
    assert detect_pitch(split.waveform(torch.tensor([i]))).item() == pytest.approx(expected, abs=0.1)


def test_few_of_many_windows_are_kept(own_sounds, monkeypatch, capsys):
    monkeypatch.setattr(common, "KEPT", 12)
    splits, _ = load_notes(options(own_sounds, None), windows=True)
    assert len(splits["train"].notes) == 12
    said = capsys.readouterr().out
    assert re.search(r"\d+ of 40 files are used", said) and re.search(r"12 of \d+ windows of 4 s are used", said)


def test_folders_are_families_of_which_some_are_chosen(own_sounds):
    about = options(own_sounds, None)
    splits, _ = load_notes(about)
    assert about["families"] == ["flute", "guitar", "piano"]
    assert all((split.pitch == 60).all() and {n.windows for n in split.notes} == {1} for split in splits.values())
    chosen = {n.family for split in load_notes(options(own_sounds, ["flute"]))[0].values() for n in split.notes}
    assert chosen == {"flute"}
    with pytest.raises(click.UsageError, match="--families tuba: expected some of flute, guitar, piano"):
        load_notes(options(own_sounds, ["tuba"]))
