/* A word before a process ends that read pages which their file has no more. */
#define _POSIX_C_SOURCE 200809L

#include <signal.h>
#include <string.h>
#include <unistd.h>

static void say(int number) {
    static const char text[] =
        "megatron-quant: error: a file of the source was cut short, or its disk failed, while it "
        "was read (SIGBUS): see what else writes it, and run again\n";
    ssize_t written = write(STDERR_FILENO, text, sizeof text - 1);
    (void)written;
    signal(number, SIG_DFL); /* the read is tried again, and ends the process as it did before */
}

/* Have SIGBUS say so, where nobody else handles it. */
void mq_explain_lost_pages(void) {
    struct sigaction before, after;
    if (sigaction(SIGBUS, NULL, &before) || before.sa_handler != SIG_DFL) return;
    memset(&after, 0, sizeof after);
    after.sa_handler = say;
    sigaction(SIGBUS, &after, NULL);
}
