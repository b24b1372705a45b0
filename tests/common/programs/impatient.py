"""``composer-prior`` with a launcher of Composer that waits 1 s, in the place of its 30, for ranks that it ends."""

import datetime

from composer.cli import launcher

from composer_prior.commands.cli import main

if __name__ == "__main__":
    launcher.CLEANUP_TIMEOUT = datetime.timedelta(seconds=1)
    main()
