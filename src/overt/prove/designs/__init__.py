"""The designs, oldest first, by the name that `overt prove` knows them by."""

from collections.abc import Mapping

from overt.prove.design import Design
from overt.prove.designs.check_error import CheckError
from overt.prove.designs.goldstein import Goldstein
from overt.prove.designs.guard import Guard
from overt.prove.designs.layton import Layton
from overt.prove.designs.linux_5_10 import Linux510
from overt.prove.designs.mainline import Mainline
from overt.prove.designs.overt_mount import OvertMount, OvertUntraced
from overt.prove.designs.sticky import Sticky

DESIGNS: Mapping[str, Design] = {
    design.name: design
    for design in (
        Linux510(),
        Layton(),
        CheckError(),
        Goldstein(),
        Sticky(),
        Mainline(),
        OvertMount(),
        OvertUntraced(),
        Guard(),
    )
}
