"""The arguments about bitmaps: every combination that is refused, with the text and the order that scripts rely on."""

from __future__ import annotations

from typing import Any, Literal, get_args

import pytest

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.named import NamedBitmap
from nbdmirror.errors import NotFoundError, StateError
from nbdmirror.mirror.bitmap_form import BitmapForm, Mode, Sync
from nbdmirror.mirror.record import Keep, Record
from nbdmirror.units import KiB, MiB

MODES: tuple[Any, ...] = get_args(Mode)
ANY: tuple[Any, ...] = (*MODES, None)

ERRORS = {
    1: "Must provide a valid bitmap name for '{sync}' sync mode",
    2: "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
    3: "Sync mode '{shown}' not supported with bitmap.",
    5: "bitmap-mode must be specified if a bitmap is provided",
    6: "Dirty bitmap 'bitmap404' not found",
    8: "Cannot specify bitmap sync mode without a bitmap",
}


def record(
    sync: Sync,
    name: str | None,
    mode: Mode | None = None,
    *,
    granularity: int = 0,
    bitmap: NamedBitmap | None = None,
    blocks: tuple[int, int] = (1, 1),
) -> Record | None:
    def find(wanted: str) -> NamedBitmap:
        if wanted != "bitmap0":
            raise NotFoundError(f"Dirty bitmap '{wanted}' not found")
        return bitmap or named()

    return BitmapForm(sync, name, mode, granularity).record(find, *blocks)


def named(granularity: int = 64 * KiB, **flags: Any) -> NamedBitmap:
    return NamedBitmap("bitmap0", DirtyBitmap(MiB, granularity), **flags)


def combinations(syncs: str, names: str, modes: tuple[Mode | None, ...], number: int) -> list[tuple[Any, ...]]:
    return [
        (sync, None if name == "none" else name, mode, number)
        for sync in syncs.split()
        for name in names.split()
        for mode in modes
    ]


@pytest.mark.parametrize(
    ("sync", "name", "mode", "number"),
    [
        *combinations("incremental bitmap", "none", ANY, 1),
        *combinations("incremental", "bitmap404 bitmap0", ("always", "never"), 2),
        *combinations("incremental", "bitmap404", ("on-success", None), 6),
        *combinations("bitmap", "bitmap404 bitmap0", (None,), 5),
        *combinations("bitmap", "bitmap404", MODES, 6),
        *combinations("full top none", "none", MODES, 8),
        *combinations("full top none", "bitmap404 bitmap0", MODES, 3),
        *combinations("top none", "bitmap404 bitmap0", (None,), 3),
        *combinations("full", "bitmap404", (None,), 6),
    ],
)
def test_what_is_refused(sync: Sync, name: str | None, mode: Mode | None, number: int) -> None:
    with pytest.raises((StateError, NotFoundError)) as caught:
        record(sync, name, mode)
    shown = "full" if sync == "top" and mode is not None else sync
    assert str(caught.value) == ERRORS[number].format(sync=sync, shown=shown)


@pytest.mark.parametrize(
    ("sync", "mode", "keep"),
    [
        ("full", None, Keep.LIVE),
        ("incremental", None, Keep.ON_SUCCESS),
        ("incremental", "on-success", Keep.ON_SUCCESS),
        ("bitmap", "on-success", Keep.ON_SUCCESS),
        ("bitmap", "always", Keep.ALWAYS),
        ("bitmap", "never", Keep.NEVER),
    ],
)
def test_what_is_taken(sync: Sync, mode: Mode | None, keep: Keep) -> None:
    made = record(sync, "bitmap0", mode)
    assert made is not None
    assert made.keep is keep


@pytest.mark.parametrize("sync", ["full", "top", "none"])
def test_no_bitmap_is_no_record(sync: Literal["full", "top", "none"]) -> None:
    assert record(sync, None) is None


FORMS = [("full", None), ("incremental", None), ("bitmap", "always"), ("bitmap", "never")]


@pytest.mark.parametrize(("sync", "mode"), FORMS)
def test_granularity_is_the_bitmaps(sync: Sync, mode: Mode | None) -> None:
    """It is refused before the bitmap is looked for."""
    for name in ("bitmap0", "bitmap404"):
        with pytest.raises(StateError, match=r"^Granularity and bitmap cannot both be set$"):
            record(sync, name, mode, granularity=65536)


@pytest.mark.parametrize(("sync", "mode"), FORMS)
def test_chunks_are_whole_blocks(sync: Sync, mode: Mode | None) -> None:
    busy = named()
    busy.users.append("export")
    with pytest.raises(StateError) as caught:
        record(sync, "bitmap0", mode, bitmap=busy, blocks=(1, 128 * KiB))
    assert str(caught.value) == (
        "Bitmap granularity 65536 is not a multiple of the target image's cluster size 131072 "
        "and the target image has no backing file"
    )
    with pytest.raises(StateError, match=r"^Bitmap granularity 512 is not a multiple of the source's block size 4096$"):
        record(sync, "bitmap0", mode, bitmap=named(512), blocks=(4096, 1))
    with pytest.raises(StateError, match=r"^Parameter 'granularity' expects a value in range \[512B, 64MB\]$"):
        record(sync, "bitmap0", mode, bitmap=named(128 * MiB))
    assert record(sync, "bitmap0", mode, bitmap=named(64 * MiB)) is not None
    assert record(sync, "bitmap0", mode, bitmap=named(4096), blocks=(4096, 512)) is not None


@pytest.mark.parametrize(("sync", "mode"), FORMS)
def test_what_state_the_bitmap_must_be_in(sync: Sync, mode: Mode | None) -> None:
    states = {
        "busy": "Bitmap 'bitmap0' is currently in use by another operation and cannot be used",
        "read_only": "Bitmap 'bitmap0' is readonly and cannot be modified",
        "inconsistent": "Bitmap 'bitmap0' is inconsistent and cannot be used",
    }
    for first in range(3):
        # Everything that is wrong from here on; the first of it is said.
        wrong = list(states)[first:]
        if mode == "never":
            wrong = [word for word in wrong if word != "read_only"]
        bitmap = named(recording=False, **{word: True for word in wrong if word != "busy"})
        if "busy" in wrong:
            bitmap.users.append("export")
        with pytest.raises(StateError) as caught:
            record(sync, "bitmap0", mode, bitmap=bitmap)
        assert str(caught.value) == states[wrong[0]]


@pytest.mark.parametrize(("sync", "mode"), FORMS)
def test_only_a_working_bitmap_must_record(sync: Sync, mode: Mode | None) -> None:
    bitmap = named(recording=False)
    if sync != "full":
        assert record(sync, "bitmap0", mode, bitmap=bitmap) is not None
        return
    with pytest.raises(StateError, match=r"^Bitmap 'bitmap0' is not enabled$"):
        record(sync, "bitmap0", mode, bitmap=bitmap)


def test_what_is_only_read_may_be_read_only() -> None:
    assert record("bitmap", "bitmap0", "never", bitmap=named(read_only=True)) is not None
