"""The base class of streamed datasets: every id goes to one process and one worker."""

import pytest

from ldm.data.base import Txt2ImgIterableBaseDataset, part_of
from ldm.data.config_module import DataModuleFromConfig
from ldm.util import UserError
from tests.ldm.data.test_datamodule import batches


class Stream(Txt2ImgIterableBaseDataset):
    def __init__(self, count):
        super().__init__(num_records=count, valid_ids=list(range(count)), size=8)

    def __iter__(self):
        yield from ({"id": number} for number in self.sample_ids)


def test_part_of_loses_nothing():
    ids = list(range(11))
    assert [number for part in range(4) for number in part_of(ids, part, 4)] == ids
    assert {len(part_of(ids, part, 4)) for part in range(4)} == {2, 3}


def test_txt2img_iterable_base_dataset_is_abstract_and_shares_its_ids():
    with pytest.raises(TypeError):
        Txt2ImgIterableBaseDataset()
    streams = [Stream(10) for _ in range(3)]
    for rank, stream in enumerate(streams):
        stream.share(rank, 3)
    assert sorted(item["id"] for stream in streams for item in stream) == list(range(10))
    assert {len(stream) for stream in streams} == {4} and len(Stream(10)) == 10
    with pytest.raises(UserError, match="2 ids are too few for 3 processes"):
        Stream(2).share(0, 3)


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_txt2img_iterable_base_dataset_is_shared_among_workers(workers):
    config = {"target": f"{__name__}.Stream", "params": {"count": 10}}
    data = DataModuleFromConfig(2, config, num_workers=workers, use_worker_init_fn=True)
    seen = [int(number) for batch in batches(data, "train") for number in batch["id"]]
    assert sorted(seen) == list(range(10))
