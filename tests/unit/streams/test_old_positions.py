"""Committed offsets in a log that is gone are deleted before the new log is read."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from kafka import TopicPartition
from kafka.errors import GroupIdNotFoundError, GroupSubscribedToTopicError, NoError

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.streams import faust_app
from perennial.streams.kafka.installation import record_found
from perennial.streams.kafka.repartition import RepartitionError, forget_offsets
from perennial.streams.kafka.topics import ClusterIds
from perennial.streams.settings import Settings

SETTINGS = Settings.of(topic_prefix="x-", env_file=None)


class Admin:
    def __init__(self, error=NoError) -> None:
        self.error, self.deleted = error, []

    def delete_group_offsets(self, group, partitions):
        if self.error is GroupIdNotFoundError:
            raise GroupIdNotFoundError
        self.deleted += [(group, partition) for partition in partitions]
        return dict.fromkeys(partitions, self.error)


def test_every_partition_s_offset_is_deleted():
    admin = Admin()
    forget_offsets(admin, SETTINGS, "curate", "retention", 2)
    assert admin.deleted == [("x-curate", TopicPartition("x-retention", number)) for number in range(2)]
    forget_offsets(Admin(GroupIdNotFoundError), SETTINGS, "curate", "retention", 2)


def test_a_process_that_still_reads_the_old_topic_is_named():
    with pytest.raises(RepartitionError, match="group x-curate still reads x-retention"):
        forget_offsets(Admin(GroupSubscribedToTopicError), SETTINGS, "curate", "retention", 1)


def test_case_10_a_retention_topic_created_again_is_read_from_its_beginning(tmp_path, monkeypatch):
    """Case 10's kind: `retention` was made again and the group's offset of the old log skipped requests to forget."""
    store, admin = DirectoryStore(tmp_path), Admin()

    def ids(topic_id):
        return ClusterIds("c", {"x-retention": topic_id}, {"x-retention": 1})

    @contextmanager
    def admin_client(_):
        yield admin

    monkeypatch.setattr(faust_app, "admin_client", admin_client)
    monkeypatch.setattr(faust_app, "identify", lambda *_: ids("one"))
    faust_app._forget_old_positions(SETTINGS, store)  # nothing is recorded yet
    record_found(SETTINGS, store, ids("one"), ["retention"])
    faust_app._forget_old_positions(SETTINGS, store)
    assert admin.deleted == []
    monkeypatch.setattr(faust_app, "identify", lambda *_: ids("two"))
    faust_app._forget_old_positions(SETTINGS, store)
    assert admin.deleted == [("x-curate", TopicPartition("x-retention", 0))]
