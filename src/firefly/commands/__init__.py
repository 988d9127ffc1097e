"""One verb, one file. A module is imported when its verb is called or helped: what is heavy waits until it runs."""
