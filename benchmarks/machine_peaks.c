// What this machine can do at most, measured: bytes a second read from memory, int8 operations a second.
//
//     cc -O3 -march=native -pthread machine_peaks.c -o machine_peaks && ./machine_peaks THREADS
//
// Prints one JSON object: read_gb_s (4 KB pages, as a mapped file has), read_huge_gb_s (2 MB pages), int8_tops of the
// widest vector instruction and its name, and amx_tops where there are tiles. A multiply-add counts as two operations;
// each figure is the best of several runs.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#endif
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { BYTES = 1 << 30, REPEATS = 5, MOST_THREADS = 256, LANES = 12 };
static const long TURNS = 30000000;

// A vector register: gcc makes wider vectors of loads and stores, and read_gb_s was a quarter too low with 64 bytes on AVX2.
#ifdef __AVX512F__
typedef int64_t vec __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef int64_t vec __attribute__((vector_size(32)));
#else
typedef int64_t vec __attribute__((vector_size(16)));
#endif

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static pthread_barrier_t barrier;
static int threads;
static const char* buffer;
static volatile int64_t sink;  // what is computed must be used, or the compiler drops it

typedef void (*work)(int thread);
static work current;

static void* loop(void* number) {
  const int thread = (int)(intptr_t)number;
  for (;;) {
    pthread_barrier_wait(&barrier);
    if (!current) return NULL;
    current(thread);
    pthread_barrier_wait(&barrier);
  }
}

// Seconds of the fastest of several runs.
static double fastest(work w) {
  double best = 1e9;
  current = w;
  for (int r = 0; r < REPEATS; r++) {
    const double start = now();
    pthread_barrier_wait(&barrier);
    w(0);
    pthread_barrier_wait(&barrier);
    const double seconds = now() - start;
    if (seconds < best) best = seconds;
  }
  return best;
}

static void read_all(int thread) {
  const size_t part = BYTES / (size_t)threads / 4096 * 4096;
  const vec* at = (const vec*)(buffer + part * (size_t)thread);
  const vec* end = (const vec*)((const char*)at + part);
  vec a = {0}, b = a, c = a, d = a;
  for (; at < end; at += 4) a += at[0], b += at[1], c += at[2], d += at[3];
  a += b + c + d;
  sink = a[0];
}

#if defined(__AVX512VNNI__)
#define INSTRUCTION "vpdpbusd zmm"
#define OPERATIONS 128
typedef __m512i acc;
static acc start_value(int i) { return _mm512_set1_epi32(i); }
static acc multiply(acc a) { return _mm512_dpbusd_epi32(a, _mm512_set1_epi8(3), _mm512_set1_epi8(5)); }
#define KEEP(a) ({ __asm__ volatile("" : "+v"(a)); })
#elif defined(__AVXVNNI__)
#define INSTRUCTION "vpdpbusd ymm"
#define OPERATIONS 64
typedef __m256i acc;
static acc start_value(int i) { return _mm256_set1_epi32(i); }
static acc multiply(acc a) { return _mm256_dpbusd_avx_epi32(a, _mm256_set1_epi8(3), _mm256_set1_epi8(5)); }
#define KEEP(a) ({ __asm__ volatile("" : "+x"(a)); })
#elif defined(__AVX2__)
#define INSTRUCTION "4 vpmaddubsw + vpmaddwd ymm"  // of codes of 4 bits so many products, and more, fit an int16 before they widen
#define OPERATIONS 256
typedef __m256i acc;
static acc start_value(int i) { return _mm256_set1_epi32(i); }
static acc multiply(acc a) {
  __m256i x = _mm256_set1_epi8(3), sum = _mm256_setzero_si256();
  for (int i = 0; i < 4; i++) {
    __asm__ volatile("" : "+x"(x));  // four products, not one
    const __m256i product = _mm256_maddubs_epi16(x, _mm256_set1_epi8(5));
    sum = i ? _mm256_add_epi16(sum, product) : product;
  }
  return _mm256_add_epi32(a, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
}
#define KEEP(a) ({ __asm__ volatile("" : "+x"(a)); })
#elif defined(__ARM_FEATURE_DOTPROD)
#define INSTRUCTION "sdot"
#define OPERATIONS 32
typedef int32x4_t acc;
static acc start_value(int i) { return vdupq_n_s32(i); }
static acc multiply(acc a) { return vdotq_s32(a, vdupq_n_s8(3), vdupq_n_s8(5)); }
#define KEEP(a) ({ __asm__ volatile("" : "+w"(a)); })
#endif

#ifdef INSTRUCTION
// Twelve accumulators by name: gcc keeps the elements of an array in memory.
#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define BEGIN(i) acc a##i = start_value(i);
#define TURN(i) a##i = multiply(a##i), KEEP(a##i);
#define JOIN(i) all ^= a##i;

static void multiply_add(int thread) {
  (void)thread;
  EACH(BEGIN)
  for (long t = 0; t < TURNS / LANES; t++) {
    EACH(TURN)
  }
  acc all = start_value(0);
  EACH(JOIN)
  sink = all[0];
}
#endif

#ifdef __AMX_INT8__
struct tiles { uint8_t palette, row, reserved[14]; uint16_t columns[16]; uint8_t rows[16]; };

static void multiply_tiles(int thread) {
  (void)thread;
  struct tiles c;
  memset(&c, 0, sizeof c);
  c.palette = 1;
  for (int i = 0; i < 8; i++) c.columns[i] = 64, c.rows[i] = 16;
  __asm__ volatile("ldtilecfg %0" : : "m"(c) : "memory");
  __asm__ volatile("tilezero %tmm0\n tilezero %tmm1\n tilezero %tmm2\n tilezero %tmm3\n"
                   "tilezero %tmm4\n tilezero %tmm5\n tilezero %tmm6\n tilezero %tmm7");
  for (long t = 0; t < TURNS / 32; t++)
    __asm__ volatile("tdpbusd %tmm6, %tmm4, %tmm0\n tdpbusd %tmm7, %tmm4, %tmm1\n"
                     "tdpbusd %tmm6, %tmm5, %tmm2\n tdpbusd %tmm7, %tmm5, %tmm3");
  __asm__ volatile("tilerelease");
}

static int tiles_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM, XTILEDATA
#endif

static double bandwidth(int huge) {
  char* memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0;
#ifdef MADV_HUGEPAGE
  madvise(memory, BYTES, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
  memset(memory, 1, BYTES);
  buffer = memory;
  const double seconds = fastest(read_all);
  munmap(memory, BYTES);
  return BYTES / seconds / 1e9;
}

int main(int count, char** arguments) {
  threads = count > 1 ? atoi(arguments[1]) : 1;
  if (threads < 1 || threads > MOST_THREADS) {
    fprintf(stderr, "threads: expected 1 to %d\n", MOST_THREADS);
    return 2;
  }
  pthread_t made[MOST_THREADS];
  pthread_barrier_init(&barrier, NULL, (unsigned)threads);
  for (int i = 1; i < threads; i++) pthread_create(&made[i], NULL, loop, (void*)(intptr_t)i);
  printf("{\"threads\": %d, \"read_gb_s\": %.2f, ", threads, bandwidth(0));
  printf("\"read_huge_gb_s\": %.2f", bandwidth(1));
#ifdef INSTRUCTION
  const double operations = (double)(TURNS / LANES * LANES) * OPERATIONS * threads;
  printf(", \"int8_tops\": %.3f, \"instruction\": \"%s\"", operations / fastest(multiply_add) / 1e12, INSTRUCTION);
#endif
#ifdef __AMX_INT8__
  if (tiles_allowed()) {
    const double tile_operations = (double)(TURNS / 32) * 4 * 2 * 16 * 16 * 64 * threads;
    printf(", \"amx_tops\": %.3f", tile_operations / fastest(multiply_tiles) / 1e12);
  }
#endif
  printf("}\n");
  current = NULL;
  pthread_barrier_wait(&barrier);
  for (int i = 1; i < threads; i++) pthread_join(made[i], NULL);
  return 0;
}
