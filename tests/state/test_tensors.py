"""What is known about single tensors."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.array_spec import DTYPES
from gockpt.state.tensors import DTYPE_OF, NAME_OF, may_alias_itself, spec_of, to_host
from gockpt.tensor_memory import as_bytes

GEOMETRIES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=3)


def test_every_stored_dtype_is_a_torch_dtype_of_that_size():
    assert DTYPE_OF.keys() == DTYPES.keys()
    for name, dtype in DTYPE_OF.items():
        assert str(dtype) == f"torch.{name}"
        assert dtype.itemsize == DTYPES[name].itemsize
        assert NAME_OF[dtype] == name


def strided(geometry):
    shape, strides = [n for n, _ in geometry], [step for _, step in geometry]
    return torch.arange(200).as_strided(shape, strides)


@given(GEOMETRIES)
def test_overlap_is_never_overlooked(geometry):
    view = strided(geometry)
    overlapping = view.unique().numel() != view.numel()
    assert may_alias_itself(view) or not overlapping


@given(st.lists(st.integers(0, 4), max_size=4), st.randoms())
def test_permuted_and_sliced_tensors_are_not_taken_for_overlapping(shape, random):
    order = list(range(len(shape)))
    random.shuffle(order)
    view = torch.zeros([2 * n for n in shape]).permute(order)
    assert not may_alias_itself(view[tuple(slice(None, None, 2) for _ in shape)])


def test_an_expanded_tensor_overlaps_unless_it_has_one_element_there():
    assert may_alias_itself(torch.ones(3, 1).expand(3, 4))
    assert not may_alias_itself(torch.ones(1, 3).expand(1, 3))
    assert may_alias_itself(torch.arange(6).unfold(0, 3, 1))


@given(GEOMETRIES)
def test_the_host_copy_is_row_major_and_apart(geometry):
    view = strided(geometry)
    copy = to_host(view)
    assert copy.is_contiguous()
    assert copy.tolist() == view.tolist()
    assert as_bytes(copy).tobytes() == view.contiguous().numpy().tobytes()
    if view.numel():
        assert copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()


def test_bytes_share_the_memory():
    tensor = torch.zeros(2, 1, dtype=torch.bfloat16)[:, :1]
    as_bytes(tensor)[:] = 255
    assert tensor.isnan().all()
    assert as_bytes(torch.zeros(3, 0)).shape == (0,)
    assert as_bytes(torch.zeros((), dtype=torch.complex128)).shape == (16,)
    strided_one = torch.zeros(1, 4, dtype=torch.int16)[:, ::4]
    assert as_bytes(strided_one).shape == (2,)


def test_the_spec():
    spec = spec_of(("model", "w"), torch.zeros(2, 0, dtype=torch.float8_e5m2))
    assert (spec.name, spec.shape, spec.dtype) == (("model", "w"), (2, 0), "float8_e5m2")
