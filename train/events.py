"""What TensorBoard shows of a run: its events, in a file.

Written by whoever logs, when it logs, so that a disk that is full or read-only is an error there.
``torch.utils.tensorboard`` leaves that to a thread of its own, which prints the traceback, too.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Events:
    """A new file of events in a run's folder, made with the first of them.

    Args:
        folder: of the run.
        first_epoch: that this process trains; what others have logged of it is not shown.
    """

    def __init__(self, folder: Path, first_epoch: int):
        # TensorBoard goes by the order of names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._begin = [
            Event(file_version="brain.Event:2"),
            Event(step=first_epoch, session_log=SessionLog(status=SessionLog.START)),
        ]

    def add(self, values: Mapping[str, float], epoch: int) -> None:
        """Show the values of an epoch.

        Raises:
            OSError: naming the file, which cannot be written.
        """
        shown = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        events = [*self._begin, Event(step=epoch, summary=Summary(value=shown))]
        try:
            with open(self._path, "ab") as file:
                writer = RecordWriter(file)
                for event in events:
                    event.wall_time = time.time()
                    writer.write(event.SerializeToString())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._begin = []
