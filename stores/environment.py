"""Makes HDF5 files independent of the environment. Imported before h5py, whose library reads the environment once."""

import os

for name in ("HDF5_DRIVER", "HDF5_VOL_CONNECTOR"):  # without the plugins that they name, the library crashes
    os.environ.pop(name, None)
