/* Preloaded into a process under valgrind: lets its other threads run while one waits for completions of an io_uring.
 * Valgrind takes io_uring_enter(2) for a call that does not block, and has all others wait until it returns. So what is
 * waited for is waited for by ppoll(2) here, of which it knows that it blocks. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>

typedef long call(long, ...);

static long enter(call *next, int ring, long submit, long flags, void *argument, size_t bytes)
{
    struct timespec *timeout = NULL;
    if ((flags & IORING_ENTER_EXT_ARG) && argument)
        timeout = (struct timespec *)(uintptr_t)((struct io_uring_getevents_arg *)argument)->ts;
    long submitted = next(__NR_io_uring_enter, ring, submit, 0L, 0L, NULL, 0L);
    if (submitted < 0)
        return submitted;
    struct pollfd ready = {.fd = ring, .events = POLLIN};
    int events = ppoll(&ready, 1, timeout, NULL);
    if (events <= 0 && submitted == 0) {
        if (events == 0)
            errno = ETIME;
        return -1;
    }
    /* What has ended is posted only by a call that asks for it. */
    long posted = next(__NR_io_uring_enter, ring, 0L, 0L, flags, argument, bytes);
    return posted < 0 && submitted == 0 ? posted : submitted;
}

long syscall(long number, ...)
{
    static call *next;
    if (!next)
        next = (call *)dlsym(RTLD_NEXT, "syscall");
    va_list list;
    va_start(list, number);
    long a[6];
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (number == __NR_io_uring_enter && a[2] > 0)
        return enter(next, (int)a[0], a[1], a[3], (void *)a[4], (size_t)a[5]);
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
