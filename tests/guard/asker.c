/* The one program of a test's container: does what it is told on standard input, a line at a time, and answers. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

static int wrong(long result) { return result < 0 ? errno : 0; }

static int syncfs_32(int fd)
{
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(344), "b"(fd) : "memory");
    return -result;
}

static int write_pages(const char *path, const char *hex, int pages)
{
    char page[4096];
    size_t size = strlen(hex) / 2;
    for (size_t at = 0; at < sizeof page; at++)
        sscanf(hex + 2 * (at % size), "%2hhx", (unsigned char *)&page[at]);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return -errno;
    while (pages--)
        if (write(fd, page, sizeof page) != sizeof page)
            return -errno;
    return fd;
}

static int by_number(const void *a, const void *b)
{
    long x = *(const long *)a, y = *(const long *)b;
    return (x > y) - (x < y);
}

/* The median of `count` calls, in nanoseconds. */
static long measure(int fd, int count, char call)
{
    long *took = malloc(count * sizeof *took), median;
    char byte = 0;
    for (int i = 0; i < count; i++) {
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        if (call == 's' ? syncfs(fd) : call == 'f' ? fsync(fd) : pwrite(fd, &byte, 1, 0) - 1)
            return -errno;
        clock_gettime(CLOCK_MONOTONIC, &to);
        took[i] = (to.tv_sec - from.tv_sec) * 1000000000L + to.tv_nsec - from.tv_nsec;
    }
    qsort(took, count, sizeof *took, by_number);
    median = took[count / 2];
    free(took);
    return median;
}

/* What one of `count` calls took, in picoseconds: they are timed together, for a clock costs as much as a write. */
static long together(int fd, int count, char call)
{
    struct timespec from, to;
    char byte = 0;
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (int i = 0; i < count; i++)
        if (call == 'f' ? fsync(fd) : pwrite(fd, &byte, 1, 0) - 1)
            return -errno;
    clock_gettime(CLOCK_MONOTONIC, &to);
    return ((to.tv_sec - from.tv_sec) * 1000000000L + to.tv_nsec - from.tv_nsec) * 1000 / count;
}

static int thread_fd;
static pthread_barrier_t barrier;
static void *thread_main(void *unused)
{
    (void)unused;
    pthread_barrier_wait(&barrier);
    return (void *)(long)wrong(syncfs(thread_fd));
}

/* `count` threads that call at once: how many were told EIO, and how many anything else but 0. */
static void at_once(int fd, int count, int *told, int *other)
{
    pthread_t threads[1000];
    thread_fd = fd;
    pthread_barrier_init(&barrier, NULL, count);
    for (int i = 0; i < count; i++)
        pthread_create(&threads[i], NULL, thread_main, NULL);
    for (int i = 0; i < count; i++) {
        void *result;
        pthread_join(threads[i], &result);
        *told += (long)result == EIO;
        *other += (long)result && (long)result != EIO;
    }
}

/* Call for `seconds`: how often, how often EIO, ENOSYS, EINTR, and anything else but 0. */
static void keep_calling(int fd, double seconds)
{
    struct timespec from, now;
    int calls = 0, eio = 0, enosys = 0, eintr = 0, other = 0;
    clock_gettime(CLOCK_MONOTONIC, &from);
    do {
        int code = wrong(syncfs(fd));
        calls++;
        eio += code == EIO, enosys += code == ENOSYS, eintr += code == EINTR;
        other += code && code != EIO && code != ENOSYS && code != EINTR;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (now.tv_sec - from.tv_sec + (now.tv_nsec - from.tv_nsec) / 1e9 < seconds);
    printf("%d %d %d %d %d\n", calls, eio, enosys, eintr, other);
}

static void nothing(int unused) { (void)unused; }

/* Thread that replaces what `fd` is, again and again, with each of the two paths in turn. */
static const char *swap_paths[2];
static int swap_fd;
static void *swap_main(void *unused)
{
    (void)unused;
    for (int i = 0;; i++) {
        int other = open(swap_paths[i % 2], O_RDONLY | O_CLOEXEC);
        dup3(other, swap_fd, O_CLOEXEC);
        close(other);
    }
    return NULL;
}

int main(void)
{
    char line[16384], path[4096], hex[256], options[4096];
    int fd, count, pair[2] = {-1, -1};
    double seconds;
    pthread_t swapper;

    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_NAME, "asker");
    for (;;) {
        if (!fgets(line, sizeof line, stdin)) {
            if (!ferror(stdin) || errno != EINTR)
                break;
            clearerr(stdin);
            continue;
        }
        if (sscanf(line, "open %4095s", path) == 1)
            printf("%d\n", (fd = open(path, O_RDONLY | O_CLOEXEC)) < 0 ? -errno : fd);
        else if (sscanf(line, "path %4095s", path) == 1)
            printf("%d\n", (fd = open(path, O_PATH | O_CLOEXEC)) < 0 ? -errno : fd);
        else if (sscanf(line, "write %4095s %255s %d", path, hex, &count) == 3)
            printf("%d\n", write_pages(path, hex, count));
        else if (sscanf(line, "dup %d", &fd) == 1)
            printf("%d\n", dup(fd));
        else if (sscanf(line, "close %d", &fd) == 1)
            printf("%d\n", wrong(close(fd)));
        else if (sscanf(line, "syncfs %d", &fd) == 1)
            printf("%d\n", wrong(syncfs(fd)));
        else if (sscanf(line, "i386 %d", &fd) == 1)
            printf("%d\n", syncfs_32(fd));
        else if (sscanf(line, "x32 %d", &fd) == 1)
            printf("%d\n", wrong(syscall(0x40000000 | 306, fd)));
        else if (sscanf(line, "fsync %d", &fd) == 1)
            printf("%d\n", wrong(fsync(fd)));
        else if (sscanf(line, "measure %255s %d %d", hex, &fd, &count) == 3)
            printf("%ld\n", measure(fd, count, hex[0]));
        else if (sscanf(line, "together %255s %d %d", hex, &fd, &count) == 3)
            printf("%ld\n", together(fd, count, hex[0]));
        else if (sscanf(line, "threads %d %d", &fd, &count) == 2) {
            int told = 0, other = 0;
            at_once(fd, count, &told, &other);
            printf("%d %d\n", told, other);
        } else if (sscanf(line, "calls %d %lf", &fd, &seconds) == 2)
            keep_calling(fd, seconds);
        else if (sscanf(line, "signals %d %255s", &count, hex) == 2) {
            struct itimerval every = {{0, count}, {0, count}};
            struct sigaction act = {.sa_handler = nothing, .sa_flags = hex[0] == 'r' ? SA_RESTART : 0};
            sigaction(SIGALRM, &act, NULL);
            printf("%d\n", wrong(setitimer(ITIMER_REAL, &every, NULL)));
        } else if (sscanf(line, "swap %d %4095s %255s", &swap_fd, path, hex) == 3) {
            swap_paths[0] = strdup(path), swap_paths[1] = strdup(hex);
            printf("%d\n", pthread_create(&swapper, NULL, swap_main, NULL));
        } else if (sscanf(line, "child %d", &fd) == 1) { /* a child calls, and answers when it is back */
            signal(SIGCHLD, SIG_IGN);
            if (!fork()) {
                printf("%d\n", wrong(syncfs(fd)));
                _exit(0);
            }
        } else if (sscanf(line, "chroot %4095s", path) == 1)
            printf("%d\n", chroot(path) || chdir("/") ? errno : 0);
        else if (sscanf(line, "unlink %4095s", path) == 1)
            printf("%d\n", wrong(unlink(path)));
        else if (sscanf(line, "mkdir %4095s", path) == 1)
            printf("%d\n", wrong(mkdir(path, 0755)));
        else if (sscanf(line, "unshare %x", &count) == 1)
            printf("%d\n", wrong(unshare(count)));
        else if (sscanf(line, "mount %255s %4095s %4095s", hex, path, options) == 3)
            printf("%d\n", wrong(mount("none", path, hex, 0, options)));
        else if (!strncmp(line, "listen", 6)) { /* a filter of its own, with a listener */
            struct sock_filter allow = {0x06, 0, 0, 0x7fff0000};
            struct sock_fprog program = {1, &allow};
            prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            printf("%d\n", wrong(syscall(317, 1, 8, &program)));
        } else if (!strncmp(line, "odd", 3)) { /* descriptors of all kinds: which call was wrongly answered, from 1 */
            int odd[] = {eventfd(0, 0), epoll_create1(0), memfd_create("m", 0), inotify_init(), socket(AF_UNIX, SOCK_STREAM, 0),
                         timerfd_create(CLOCK_MONOTONIC, 0), open("/proc/self/status", O_RDONLY),
                         open("/proc/self/ns/mnt", O_RDONLY), open("/", O_PATH), -1, INT_MAX};
            count = 0;
            for (size_t at = 0; at < sizeof odd / sizeof *odd; at++)
                if (wrong(syncfs(odd[at])) != (at < 8 ? 0 : EBADF))
                    count = at + 1;
            printf("%d\n", count);
        } else if (!strncmp(line, "fork", 4)) {
            /* The child shares all descriptions and takes over; the parent waits, for its namespace's sake. */
            if (fork())
                for (;;)
                    pause();
            printf("0\n");
        } else if (sscanf(line, "send %d", &fd) == 1) { /* leave a description in a socket's queue, and close it */
            char control[CMSG_SPACE(sizeof(int))] = {0}, byte = 0;
            struct iovec data = {&byte, 1};
            struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
                                     .msg_controllen = sizeof control};
            struct cmsghdr *head = CMSG_FIRSTHDR(&message);
            head->cmsg_level = SOL_SOCKET, head->cmsg_type = SCM_RIGHTS, head->cmsg_len = CMSG_LEN(sizeof(int));
            memcpy(CMSG_DATA(head), &fd, sizeof fd);
            socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
            printf("%d\n", sendmsg(pair[0], &message, 0) == 1 ? wrong(close(fd)) : errno);
        } else if (!strncmp(line, "receive", 7)) {
            char control[CMSG_SPACE(sizeof(int))], byte;
            struct iovec data = {&byte, 1};
            struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
                                     .msg_controllen = sizeof control};
            recvmsg(pair[1], &message, 0);
            memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
            printf("%d\n", fd);
        } else
            printf("?\n");
    }
    return 0;
}
