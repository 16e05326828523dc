from __future__ import annotations

import pytest

from nbdmirror.bitmap.dirty import DirtyBitmap
from nbdmirror.bitmap.named import MAX_NAME, BitmapSet, NamedBitmap
from nbdmirror.errors import StateError

GRAIN = 4096
SIZE = 10 * GRAIN


def made(name: str = "b", **flags: bool) -> NamedBitmap:
    return NamedBitmap(name, DirtyBitmap(SIZE, GRAIN), **flags)


def test_name_has_bounds() -> None:
    with pytest.raises(StateError, match="Bitmap name cannot be empty"):
        made("")
    made("ä" * (MAX_NAME // 2))
    with pytest.raises(StateError, match="Bitmap name too long"):
        made("ä" * (MAX_NAME // 2 + 1))


@pytest.mark.parametrize(
    ("bitmap", "users", "removable", "usable", "modifiable"),
    [
        (made(), [], "", "", ""),
        (made(recording=False), [], "", "", ""),
        (made(), ["export"], "in use", "in use", "in use"),
        (made(read_only=True), [], "readonly", "", "readonly"),
        (made(inconsistent=True), [], "", "inconsistent", "inconsistent"),
        (made(inconsistent=True, read_only=True), ["job"], "in use", "in use", "in use"),
        (made(inconsistent=True, read_only=True), [], "readonly", "inconsistent", "readonly"),
    ],
)
def test_state_forbids(bitmap: NamedBitmap, users: list[str], removable: str, usable: str, modifiable: str) -> None:
    bitmap.users[:] = users
    for check, forbids in (
        (bitmap.check_removable, removable),
        (bitmap.check_usable, usable),
        (bitmap.check_modifiable, modifiable),
    ):
        if forbids:
            with pytest.raises(StateError, match=forbids):
                check()
        else:
            check()


def test_writes_mark_what_records() -> None:
    bitmaps = BitmapSet(lambda: ())
    first, second, off = made("first"), made("second"), made("off", recording=False)
    for bitmap in (first, second, off):
        bitmaps.add(bitmap)
    bitmaps.write_begins(GRAIN - 1, 2)
    bitmaps.stop_recording(first)
    bitmaps.record(off)
    bitmaps.write_begins(5 * GRAIN, GRAIN)
    bitmaps.remove(second)
    bitmaps.write_begins(7 * GRAIN, 1)
    assert [list(bitmap.bits.runs()) for bitmap in (first, second, off)] == [[(0, 2)], [(0, 2), (5, 6)], [(5, 6), (7, 8)]]


def test_name_is_there_once() -> None:
    bitmaps = BitmapSet(lambda: ())
    first = made("b")
    bitmaps.add(first)
    with pytest.raises(StateError, match="Bitmap already exists: b"):
        bitmaps.add(made("b"))
    assert (bitmaps.get("b"), bitmaps.get("other")) == (first, None)


def test_write_in_flight_counts_after_a_clear_and_for_who_starts_to_record() -> None:
    bitmaps = BitmapSet(lambda: [(GRAIN, 2 * GRAIN)])
    early, late = made("early"), made("late", recording=False)
    bitmaps.add(early)
    bitmaps.add(late)
    early.bits.fill()
    late.bits.fill()
    bitmaps.clear(early)
    bitmaps.clear(late)
    assert [list(bitmap.bits.runs()) for bitmap in (early, late)] == [[(1, 3)], []]
    bitmaps.record(late)
    assert list(late.bits.runs()) == [(1, 3)]


def test_removal_taken_back_leaves_all_as_it_was() -> None:
    bitmaps = BitmapSet(lambda: ())
    for name in "abc":
        bitmaps.add(made(name))
    middle = bitmaps.get("b")
    assert middle is not None
    place = bitmaps.remove(middle)
    bitmaps.write_begins(0, 1)
    bitmaps.put_back(middle, place)
    bitmaps.write_begins(GRAIN, 1)
    assert [(each.name, list(each.bits.runs())) for each in bitmaps] == [("a", [(0, 2)]), ("b", [(1, 2)]), ("c", [(0, 2)])]


def test_clearing_makes_a_bitmap_consistent_that_goes_on_as_it_was_meant_to() -> None:
    bitmaps = BitmapSet(lambda: [(GRAIN, 1)])
    meant_to_record, disabled = made("a", inconsistent=True), made("b", inconsistent=True, recording=False)
    for bitmap in (meant_to_record, disabled):
        bitmap.bits.fill()
        bitmaps.add(bitmap)
        assert not bitmap.recording
    bitmaps.write_begins(0, 1)
    for bitmap in (meant_to_record, disabled):
        bitmaps.clear(bitmap)
        bitmap.check_usable()
    assert (meant_to_record.recording, disabled.recording) == (True, False)
    assert [list(bitmap.bits.runs()) for bitmap in bitmaps] == [[(1, 2)], []]
    bitmaps.write_begins(0, 1)
    assert [bitmap.bits.count for bitmap in bitmaps] == [2, 0]


def test_who_keeps_a_bitmap_hears_of_its_changes() -> None:
    bitmaps, bitmap = BitmapSet(list), made()
    heard: list[bool] = []
    bitmap.on_change = lambda: heard.append(bitmap.recording)
    bitmaps.add(bitmap)
    bitmaps.stop_recording(bitmap)
    bitmaps.record(bitmap)
    bitmaps.clear(bitmap)
    assert heard == [True, False, True, True]
    bitmaps.write_begins(0, 1)
    assert len(heard) == 4
