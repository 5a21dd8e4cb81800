"""Folders on disk become samples: layouts, readers, packs, fingerprints, resampling."""

from paperworks.data.fingerprint import Fingerprint as Fingerprint
from paperworks.data.folder import Folder as Folder
from paperworks.data.folder import open_folder as open_folder
from paperworks.data.images import Header as Header
from paperworks.data.images import read_header as read_header
from paperworks.data.images import read_image as read_image
from paperworks.data.images import read_mask as read_mask
from paperworks.data.layouts import Item as Item
from paperworks.data.layouts import Problem as Problem
from paperworks.data.packs import available_packs as available_packs
from paperworks.data.packs import verify_pack as verify_pack
