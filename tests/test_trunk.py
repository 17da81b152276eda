import numpy as np

from train.trunk import trunk_box


def test_the_box_is_the_largest_tissue_without_table_and_arms() -> None:
    scan = np.full((6, 60, 80), -1000, np.int16)
    scan[:, 10:40, 20:60] = 30
    scan[:, 20:30, 4:12] = 30
    scan[:, 50:52, :] = 100
    assert trunk_box(scan) == (slice(10, 40), slice(20, 60))


def test_the_box_covers_all_slices_and_odd_ends() -> None:
    scan = np.full((4, 21, 31), -1000, np.int16)
    scan[0, 2:21, 6:20] = 0
    scan[1:, 4:10, 10:31] = 0
    assert trunk_box(scan) == (slice(2, 21), slice(6, 31))


def test_in_air_the_box_is_the_plane() -> None:
    assert trunk_box(np.full((2, 5, 7), -1000, np.int16)) == (slice(0, 5), slice(0, 7))
