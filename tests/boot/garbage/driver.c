/*
 * A driver that speaks garbage: takes virtio devices from the kernel of its machine, and drives them by their registers (Virtual I/O
 * Device Version 1.2, section 4.1) with whatever the seed says.
 *
 * usage: driver SEED ROUNDS DEVICE...    DEVICE is the number that PCI has for it, such as 0x105a for an fs device
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define DEVICES "/sys/bus/pci/devices"
#define PAGE 4096ul
#define PAGES 64
/* Registers of the common configuration (section 4.1.4.3). */
enum { DRIVER_SELECT = 8, DRIVER = 12, STATUS = 20, SELECT = 22, SIZE = 24, ENABLE = 28, TABLE = 32, COMMON_BYTES = 56 };

static uint64_t state;
static unsigned char *pages;
static uint64_t physical[PAGES];

/* xorshift64*, by Vigna. */
static uint64_t any(void) {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717ull;
}

static uint64_t below(uint64_t limit) { return any() % limit; }

/* A place in guest memory, mostly: of this program's pages, at their ends, outside of memory, or anything. */
static uint64_t address(void) {
    switch (below(8)) {
    case 0: return any();
    case 1: return -below(65536);
    case 2: return physical[below(PAGES)] + PAGE - below(32);
    case 3: return 0xfe000000u + below(1 << 24);
    case 4: return below(1 << 20);
    default: return physical[below(PAGES)] + below(PAGE);
    }
}

static void fail(const char *what, const char *name) {
    printf("driver: %s: %s\n", name, what);
    exit(3);
}

static void put(const char *path, const char *text) {
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0) return;
    if (write(file, text, strlen(text)) < 0) perror(path);
    close(file);
}

/* Memory that stays where it is, and where that is: bits 0 to 54 of a page's word (pagemap.rst). */
static void memory(void) {
    pages = mmap(0, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pages == MAP_FAILED || mlockall(MCL_CURRENT | MCL_FUTURE) || map < 0) fail("no memory", "self");
    for (unsigned page = 0; page < PAGES; page++) {
        uint64_t word = 0;
        off_t at = ((uintptr_t)pages / PAGE + page) * 8;
        if (pread(map, &word, 8, at) != 8) fail("no pagemap", "self");
        physical[page] = (word & ((1ull << 55) - 1)) * PAGE;
    }
    close(map);
}

struct device {
    volatile unsigned char *common, *notify, *config;
    unsigned notify_bytes, config_bytes;
};

/* Maps what the capabilities of a device name (section 4.1.4). */
static int find(const char *name, struct device *device) {
    char path[300];
    unsigned char config[256] = {0};
    snprintf(path, sizeof path, DEVICES "/%s/config", name);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0 || pread(file, config, sizeof config, 0) < 64) return 0;
    /* Memory and bus master, which go with the driver. */
    unsigned short command = config[4] | config[5] << 8 | 6;
    if (pwrite(file, &command, 2, 4) != 2) perror(path);
    close(file);
    memset(device, 0, sizeof *device);
    for (unsigned at = config[0x34] & 0xfc, count = 0; at && count < 48; at = config[at + 1] & 0xfc, count++) {
        if (config[at] != 9 || at + 16 > 256) continue;
        uint32_t offset, length;
        memcpy(&offset, config + at + 8, 4);
        memcpy(&length, config + at + 12, 4);
        if (config[at + 3] > 4 || !length) continue;
        snprintf(path, sizeof path, DEVICES "/%s/resource%d", name, config[at + 4]);
        int bar = open(path, O_RDWR | O_CLOEXEC);
        if (bar < 0) continue;
        unsigned char *here = mmap(0, (length + PAGE - 1) & -PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, bar, offset & -PAGE);
        close(bar);
        if (here == MAP_FAILED) { perror(path); continue; }
        here += offset & (PAGE - 1);
        switch (config[at + 3]) {
        case 1: device->common = here; break;
        case 2: device->notify = here, device->notify_bytes = length; break;
        case 4: device->config = here, device->config_bytes = length; break;
        }
    }
    return device->common && device->notify;
}

static void set16(struct device *d, unsigned at, uint16_t value) { *(volatile uint16_t *)(d->common + at) = value; }
static void set32(struct device *d, unsigned at, uint32_t value) { *(volatile uint32_t *)(d->common + at) = value; }
static void set64(struct device *d, unsigned at, uint64_t value) { set32(d, at, value), set32(d, at + 4, value >> 32); }

/* As a driver should, or nearly (section 3.1.1): a table, an available and a used ring for each queue. */
static void start(struct device *d, int honest) {
    d->common[STATUS] = 0;
    d->common[STATUS] = 3;
    set32(d, DRIVER_SELECT, 0);
    set32(d, DRIVER, honest ? 0 : any());
    set32(d, DRIVER_SELECT, 1);
    set32(d, DRIVER, honest ? 1 : any() | 1);
    d->common[STATUS] = 11;
    for (unsigned queue = 0; queue < 4; queue++) {
        set16(d, SELECT, queue);
        if (!*(volatile uint16_t *)(d->common + SIZE)) break;
        set16(d, SIZE, honest || below(4) ? 64 : any());
        for (unsigned part = 0; part < 3; part++)
            set64(d, TABLE + 8 * part, honest || below(8) ? physical[queue * 3 + part] : address());
        set16(d, ENABLE, 1);
    }
    d->common[STATUS] = 15;
}

/* Descriptors and rings of what is mostly nearly right (section 2.7). */
static void offer(unsigned queue) {
    unsigned char *table = pages + queue * 3 * PAGE;
    uint16_t *available = (uint16_t *)(table + PAGE);
    for (unsigned index = 0; index < 64; index++) {
        uint64_t at = address();
        uint32_t length = below(4) ? below(300) : any();
        uint16_t flags = below(8) ? below(8) : any(), next = below(8) ? below(64) : any();
        memcpy(table + 16 * index, &at, 8);
        memcpy(table + 16 * index + 8, &length, 4);
        memcpy(table + 16 * index + 12, &flags, 2);
        memcpy(table + 16 * index + 14, &next, 2);
        available[2 + index] = below(16) ? below(64) : any();
    }
    available[0] = any();
    available[1] += below(16) ? below(64) : any();
    /* What buffers have: now and then something like the head of a request. */
    for (unsigned page = 12; page < PAGES; page++) {
        uint32_t *words = (uint32_t *)(pages + page * PAGE);
        for (unsigned word = 0; word < 24; word++) words[word] = below(2) ? below(64) : any();
    }
}

static void registers(struct device *d) {
    for (unsigned count = 0; count < 40; count++) {
        unsigned at = below(COMMON_BYTES);
        switch (below(3)) {
        case 0: d->common[at] = any(); break;
        case 1: set16(d, at & ~1u, any()); break;
        default: set32(d, at & ~3u, any());
        }
        if (d->config && d->config_bytes >= 4 && !below(4)) d->config[below(d->config_bytes)] = any();
    }
}

static void kick(struct device *d) {
    for (unsigned count = 0; count < 8; count++) {
        unsigned at = below(4) ? below(4) * 4 : below(d->notify_bytes) & ~1u;
        *(volatile uint16_t *)(d->notify + at) = below(4) ? at / 4 : any();
    }
}

static void drive(const char *name, unsigned rounds) {
    char path[300];
    struct device device;
    snprintf(path, sizeof path, DEVICES "/%s/driver/unbind", name);
    put(path, name);
    snprintf(path, sizeof path, DEVICES "/%s/enable", name);
    put(path, "1");
    if (!find(name, &device)) fail("no registers", name);
    for (unsigned round = 0; round < rounds; round++) {
        if (!below(4)) registers(&device);
        start(&device, below(2));
        for (unsigned queue = 0; queue < 4; queue++) offer(queue);
        for (unsigned times = 0; times < 4; times++) {
            kick(&device);
            if (!below(8)) registers(&device);
            if (!below(2)) offer(below(4));
        }
    }
    device.common[STATUS] = 0;
    printf("driver: %s: %u rounds\n", name, rounds);
    fflush(stdout);
}

int main(int count, char **words) {
    state = strtoull(words[1], 0, 10) * 2 + 1;
    memory();
    unsigned driven = 0;
    for (int word = 3; word < count; word++) {
        DIR *devices = opendir(DEVICES);
        struct dirent *entry;
        while (devices && (entry = readdir(devices))) {
            char path[300], text[16] = "";
            snprintf(path, sizeof path, DEVICES "/%s/device", entry->d_name);
            int file = open(path, O_RDONLY | O_CLOEXEC);
            if (file < 0 || read(file, text, 15) <= 0) continue;
            close(file);
            if (strtoul(text, 0, 16) != strtoul(words[word], 0, 16)) continue;
            drive(entry->d_name, strtoul(words[2], 0, 10));
            driven++;
        }
        closedir(devices);
    }
    printf("driver: %u devices\n", driven);
    return driven ? 0 : 3;
}
