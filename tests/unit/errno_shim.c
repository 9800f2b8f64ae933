/* Preloaded: the N-th call of one kind on a path below one folder fails with a chosen errno.
 *
 * shim_arm chooses kind, folder, N and errno, and sets the count back; shim_seen returns the count.
 * Both names of a call are taken, with and without the suffix 64. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[PATH_MAX], kind[32];
static long number, seen;
static int code;

void shim_arm(const char *below, const char *call, long n, int error)
{
    snprintf(folder, sizeof folder, "%s", below);
    snprintf(kind, sizeof kind, "%s", call);
    __atomic_store_n(&seen, 0, __ATOMIC_SEQ_CST);
    number = n;
    code = error;
}

long shim_seen(void)
{
    return __atomic_load_n(&seen, __ATOMIC_SEQ_CST);
}

static int fails_at(const char *call, const char *path)
{
    size_t length = strlen(folder);
    if (!length || strcmp(call, kind) || strncmp(path, folder, length))
        return 0;
    if (path[length] && path[length] != '/')
        return 0;
    if (__atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST) != number)
        return 0;
    errno = code;
    return 1;
}

static int fails_of(const char *call, int fd)
{
    char link[64], path[PATH_MAX];
    if (strcmp(call, kind))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return fails_at(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...)                                                     \
    {                                                                                              \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                    \
        va_end(rest);                                                                              \
        return fails_at("open", path) ? -1 : REAL(name)(path, flags, mode);                        \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                               \
    int name(int at, const char *path, int flags, ...)                                             \
    {                                                                                              \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                    \
        va_end(rest);                                                                              \
        int fails = *path == '/' ? fails_at("openat", path) : fails_of("openat", at);              \
        return fails ? -1 : REAL(name)(at, path, flags, mode);                                     \
    }
OPENAT(openat)
OPENAT(openat64)

int rename(const char *old, const char *new)
{
    return fails_at("rename", old) ? -1 : REAL(rename)(old, new);
}

int fsync(int fd)
{
    return fails_of("fsync", fd) ? -1 : REAL(fsync)(fd);
}

ssize_t write(int fd, const void *data, size_t size)
{
    return fails_of("write", fd) ? -1 : REAL(write)(fd, data, size);
}

#define PWRITE(name, offset_t)                                                                     \
    ssize_t name(int fd, const void *data, size_t size, offset_t at)                               \
    {                                                                                              \
        return fails_of("pwrite", fd) ? -1 : REAL(name)(fd, data, size, at);                       \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define FTRUNCATE(name, offset_t)                                                                  \
    int name(int fd, offset_t size)                                                                \
    {                                                                                              \
        return fails_of("ftruncate", fd) ? -1 : REAL(name)(fd, size);                              \
    }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

#define FALLOCATE(name, offset_t)                                                                  \
    int name(int fd, int mode, offset_t at, offset_t size)                                         \
    {                                                                                              \
        return fails_of("fallocate", fd) ? -1 : REAL(name)(fd, mode, at, size);                    \
    }
FALLOCATE(fallocate, off_t)
FALLOCATE(fallocate64, off64_t)
