"""What every method that compares two networks asks of them first."""

from __future__ import annotations

from kdcli.errors import IncompatibleError
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.models.panel import Panel


def backbone(teacher: Network | Headed | Panel) -> Network:
    """The network whose features are the teacher's, without heads or assistants."""
    if isinstance(teacher, Headed):
        return teacher.network
    return teacher.teacher if isinstance(teacher, Panel) else teacher


def network_of(features: Features) -> Network:
    """The network that made the features, whose stages can be called."""
    assert isinstance(features.network, Network)
    return features.network


def require_same_outputs(student: Network, teacher: Network | Headed | Panel) -> None:
    """Refuse networks whose logits cannot be compared class by class, before anything is trained.

    Raises:
        IncompatibleError: the teacher, or one of its assistants, has another number of outputs.
    """
    if isinstance(teacher, Panel):
        networks = [network for network in teacher.networks if isinstance(network, Network)]
    else:
        networks = [backbone(teacher)]
    for network in networks:
        if network.outputs != student.outputs:
            raise IncompatibleError(
                f"the student has {student.outputs} outputs and {network.arch or 'the teacher'} has {network.outputs}",
                field="--teacher",
                hint="use a teacher of the same data set",
            )
