"""Run AI agents in isolated containers, on Trio.

See :func:`open_engine`.
"""

# General layout:
#
# Modules are private, and follow the way of the data; none imports from further down.
#
#   _errors, _models, _settings   what is said: errors, values, the operator's wishes
#   _text, _codec                 text fit for a terminal; JSON <-> models
#   _hostfs, _groups              safe files; where everything of a group is
#   _runtimes                     what a runtime is
#   _sessions                     what a group's agent keeps between runs
#   _forbidden, _allowlist        what nobody is ever given; what the operator allows
#   _grants                       a group's wishes -> mounts, held, and refusals
#   _mounts                       a group -> what its container sees, held
#   _process, _seccomp            client processes; what bwrap's sandbox denies
#   _flavours, _netns             how clients are asked; sockets inside a container
#   _bwrap, _docker               the runtimes
#   _image, _agent                building the image; the agent that bwrap runs
#   _credentials, _proxy          the API's credential; requests that carry it upstream
#   _access, _outfit              a run's way to the API; all that a run starts with
#   _stdin                        words -> the agent
#   _markers                      the agent's bytes -> outputs (sans-I/O)
#   _turns                        outputs -> who owes whom an answer (sans-I/O)
#   _handover                     outputs -> the caller, one at a time
#   _runlog                       what is kept of a run
#   _events                       what happens in runs, for whoever watches
#   _status                       what an engine tells other processes of itself
#   _teardown, _sweep             the stop ladder, the janitor; what the dead left
#   _run                          the nursery that joins all these
#   _mailbox                      files that agents write -> requests
#   _upkeep, _engine              disk space and trash; what runs share
#   _store                        what must outlive a dispatcher
#   _queue                        who runs next (sans-I/O)
#   _dispatcher                   messages of many chats -> runs
#   _scheduler                    tasks that are due -> the dispatcher
#   testing                       fakes, public
#   _cli                          the command line

import logging

import attrs

from ._dispatcher import (
    Dispatcher as Dispatcher,
    DispatcherStatistics as DispatcherStatistics,
    open_dispatcher as open_dispatcher,
)
from ._engine import (
    Engine as Engine,
    EngineStatistics as EngineStatistics,
    open_engine as open_engine,
)
from ._errors import (
    AllowlistError as AllowlistError,
    ClawtrioError as ClawtrioError,
    CredentialsError as CredentialsError,
    FollowUpRefusedError as FollowUpRefusedError,
    GroupBusyError as GroupBusyError,
    GroupFolderError as GroupFolderError,
    NotStartedError as NotStartedError,
    RunClosedError as RunClosedError,
    RuntimeUnavailableError as RuntimeUnavailableError,
    ScheduleError as ScheduleError,
    SettingsError as SettingsError,
    StoreBusyError as StoreBusyError,
    UnknownChatError as UnknownChatError,
    UnknownTaskError as UnknownTaskError,
    UnsafePathError as UnsafePathError,
)
from ._events import (
    Events as Events,
    RunDeadlineMoved as RunDeadlineMoved,
    RunEnded as RunEnded,
    RunEvent as RunEvent,
    RunFollowUp as RunFollowUp,
    RunOutput as RunOutput,
    RunStarted as RunStarted,
    RunStopping as RunStopping,
)
from ._mailbox import (
    CancelTask as CancelTask,
    PauseTask as PauseTask,
    RefreshGroups as RefreshGroups,
    RegisterGroup as RegisterGroup,
    Request as Request,
    Requests as Requests,
    ResumeTask as ResumeTask,
    ScheduleTask as ScheduleTask,
    SendMessage as SendMessage,
    UpdateTask as UpdateTask,
)
from ._markers import MarkerParser as MarkerParser
from ._models import (
    AdditionalMount as AdditionalMount,
    AgentOutput as AgentOutput,
    AllowedRoot as AllowedRoot,
    AvailableGroup as AvailableGroup,
    ContainerConfig as ContainerConfig,
    DroppedFrame as DroppedFrame,
    Ending as Ending,
    Group as Group,
    MountAllowlist as MountAllowlist,
    RunResult as RunResult,
    ScheduledTask as ScheduledTask,
    Usage as Usage,
    VolumeMount as VolumeMount,
)
from ._run import Run as Run, RunStatistics as RunStatistics
from ._runtimes import (
    Container as Container,
    ContainerSpec as ContainerSpec,
    FoundContainer as FoundContainer,
    HeldMount as HeldMount,
    Runtime as Runtime,
)
from ._scheduler import Scheduler as Scheduler, open_scheduler as open_scheduler
from ._settings import Settings as Settings
from ._store import (
    Change as Change,
    Contents as Contents,
    MemoryStore as MemoryStore,
    Message as Message,
    SqliteStore as SqliteStore,
    Store as Store,
)

# A library says nothing where the application has not asked for it.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# Tracebacks and documentation name the public place.
for _name, _value in list(globals().items()):
    if not _name.startswith("_") and getattr(_value, "__module__", "").startswith(
        f"{__name__}._"
    ):
        if isinstance(_value, type) and attrs.has(_value):
            # They are written as names of the module that the class is from.
            attrs.resolve_types(_value)
            _value.__annotations__ = {f.name: f.type for f in attrs.fields(_value)}
        _value.__module__ = __name__
del _name, _value, attrs, logging
