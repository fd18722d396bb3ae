never included
