/* What no ordinary program does alone: each word is a command, its operands follow. */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static unsigned long sum(const unsigned char *bytes, unsigned long size) {
    unsigned long total = 0;
    for (unsigned long at = 0; at < size; at++) total += bytes[at];
    return total;
}

/* Maps a file and touches all of it; never reads it. */
static void map(const char *path) {
    struct stat st;
    int file = open(path, O_RDONLY);
    if (file < 0 || fstat(file, &st) < 0) return;
    unsigned char *bytes = mmap(0, st.st_size, PROT_READ, MAP_SHARED, file, 0);
    if (bytes != MAP_FAILED) printf("%s %lu\n", path, sum(bytes, st.st_size));
    close(file);
}

/* Names alone: no entry is stated. */
static void list(const char *path) {
    DIR *directory = opendir(path);
    struct dirent *entry;
    while (directory && (entry = readdir(directory))) printf("%s/%s %d\n", path, entry->d_name, entry->d_type);
    if (directory) closedir(directory);
}

/* Looks for a name in every way there is. */
static void look(const char *path) {
    struct stat st;
    char text[100];
    printf("%s %d %d %d %d %zd\n", path, access(path, R_OK), stat(path, &st), lstat(path, &st),
           open(path, O_RDONLY), readlink(path, text, sizeof text));
}

/* Goes to a folder by descriptor, and asks from there. */
static void at(const char *path) {
    struct stat st;
    char byte, text[100];
    int directory = open(path, O_RDONLY | O_DIRECTORY);
    if (directory < 0) return;
    printf("%d %d\n", fstatat(directory, "by-descriptor", &st, 0), fstatat(directory, "../real/no", &st, 0));
    int file = openat(directory, "below/read", O_RDONLY);
    printf("%zd %zd\n", read(file, &byte, 1), readlinkat(directory, "below/up", text, sizeof text));
    if (fchdir(directory) == 0) printf("%d %d\n", access("below/../after-fchdir", F_OK), chdir("below/up/below"));
    printf("%d\n", access("after-chdir", F_OK));
}

int main(int count, char **words) {
    void (*act)(const char *) = 0;
    for (int index = 1; index < count; index++) {
        const char *word = words[index];
        if (!strcmp(word, "map")) act = map;
        else if (!strcmp(word, "list")) act = list;
        else if (!strcmp(word, "look")) act = look;
        else if (!strcmp(word, "at")) act = at;
        else if (act) act(word);
    }
    return 0;
}
