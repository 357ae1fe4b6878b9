"""Lists of tables and of tensors: what one call does to all is what torch does to each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pushstep.optim.ops.copies import Runs
from pushstep.optim.ops.rows import Merging, OutOfBounds, coalesce, different, moved

# rows and width of each table, and how many ids of it there are
TABLES = [(100, 3, 700), (5, 1, 0), (3000, 16, 40), (70000, 5, 900), (9, 7, 1)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def drawn(rows: int, width: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, rows, (count,))
    return ids.sort().values.unique() if count == 40 else ids, torch.randn(count, width).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_are_merged_together_as_one_by_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pairs = [drawn(*table, dtype) for table in TABLES]
    pairs = [(ids, rows[: ids.numel()]) for ids, rows in pairs]
    merging = Merging(pairs, [rows for rows, _, _ in TABLES])
    whole = torch.zeros(
        sum(merging.counts[k] * (8 + merging.row_bytes(k)) for k in range(5)), dtype=torch.uint8
    )
    at, ids_to, rows_to = whole.data_ptr(), [], []
    for table, count in enumerate(merging.counts):
        ids_to.append(at)
        rows_to.append(at + 8 * count)
        at = rows_to[-1] + merging.row_bytes(table) * count
    merging.write_all(rows_to, ids_to)
    begin = 0
    for table, (ids, rows) in enumerate(pairs):
        expected_ids, expected_rows = coalesce(ids, rows)
        assert torch.equal(merging.ids(table), expected_ids)
        assert torch.equal(merging.rows(table), expected_rows)
        places = merging.places(table)
        assert torch.equal(expected_ids if places is None else expected_ids[places], ids)
        count = merging.counts[table]
        written = whole[begin : begin + count * (8 + merging.row_bytes(table))]
        assert written.tolist() == [*_bytes(expected_ids), *_bytes(expected_rows)]
        begin += written.numel()
        middle = torch.zeros(count * merging.row_bytes(table), dtype=torch.uint8)
        for first in range(0, count, 33):
            merging.write(table, middle.data_ptr(), first, min(first + 33, count))
        assert middle.tolist() == _bytes(expected_rows)


def _bytes(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).view(-1).tolist() if tensor.numel() else []


@pytest.mark.parametrize("wrong", [-1, 3000, 2**63 - 1])
def test_an_id_outside_its_table_is_named(wrong: int) -> None:
    pairs = [(torch.tensor([1, 2]), torch.ones(2, 3)), (torch.tensor([0, wrong, 7]), torch.ones(3, 4))]
    with pytest.raises(OutOfBounds) as caught:
        Merging(pairs, [100, 3000])
    assert (caught.value.table, caught.value.row) == (1, wrong)
    with pytest.raises(IndexError):
        moved([torch.zeros(3000, 4)], [torch.tensor([0, wrong])])


def test_rows_are_moved_out_of_tables_and_into_them() -> None:
    torch.manual_seed(0)
    tables = [torch.randn(rows, width) for rows, width, _ in TABLES]
    ids = [torch.randperm(rows)[:count] for rows, _, count in TABLES]
    out = [torch.zeros(len(named), table.shape[1]) for table, named in zip(tables, ids, strict=True)]
    named_out = [torch.zeros_like(named) for named in ids]
    rows = moved(tables, ids)
    rows.gather([each.data_ptr() for each in out], [each.data_ptr() for each in named_out])
    for table, named, gathered, copied in zip(tables, ids, out, named_out, strict=True):
        assert torch.equal(gathered, table[named])
        assert torch.equal(copied, named)
    new = [torch.randn_like(each) for each in out]
    expected = [t.index_copy(0, i, r) for t, i, r in zip(tables, ids, new, strict=True)]
    rows.scatter([each.data_ptr() for each in new])
    assert all(map(torch.equal, tables, expected))


def test_the_different_ones_of_ids() -> None:
    ids = torch.randint(0, 5000, (9000,))
    assert torch.equal(different(ids), ids.unique())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_gathered_and_scattered(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = [1, 0, 7, 40000, 8, 3_000_000, 2, 0]
    tensors = [torch.randn(size).to(dtype) for size in sizes]
    runs = Runs(sizes, dtype)
    addresses = runs.addresses(tensors)
    assert addresses is not None
    assert runs.still(tensors, addresses)
    whole = torch.cat(tensors)
    made = torch.zeros_like(whole)
    runs.gather(made.data_ptr(), addresses)
    assert torch.equal(made, whole)
    part = torch.zeros(1000, dtype=torch.uint8)
    runs.gather(part.data_ptr() - 77, addresses, 77, 1077)
    assert torch.equal(part, whole.view(torch.uint8)[77:1077])
    runs.scatter(addresses, whole.flip(0))
    assert torch.equal(torch.cat(tensors), whole.flip(0))
    which = torch.tensor([True, False, True, False, False, True, False, True]).numpy()
    targets = [torch.zeros_like(tensor) for tensor in tensors]
    others = runs.addresses(targets)
    assert others is not None
    runs.gather_those(others, addresses, which)
    assert all(
        torch.equal(target, tensor if chosen else torch.zeros_like(tensor))
        for target, tensor, chosen in zip(targets, tensors, which, strict=True)
    )


def test_tensors_that_are_no_plain_memory_of_their_sizes_have_no_addresses() -> None:
    runs = Runs([4, 4], torch.float32)
    one = torch.ones(4)
    for other in (
        torch.ones(8)[::2],
        torch.ones(4, dtype=torch.float64),
        torch.ones(5),
        torch.ones(4, dtype=torch.complex64).conj().imag,
        torch.ones(2, 2).t(),
    ):
        assert runs.addresses([one, other]) is None
