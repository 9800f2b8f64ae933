/* Of the signatures in this folder: formats/native.py calls no library of another version. */
int mq_version(void) { return 3; }
