// Fibers: stacks of their own, switched without the operating system, whose ucontext costs two system calls a switch.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace emulated {

struct Fiber {
  void* stack_pointer;
};

extern "C" void emulated_switch(void** from, void* to);

#if defined(__APPLE__)
#define EMULATED_SYMBOL "_emulated_switch"
#else
#define EMULATED_SYMBOL "emulated_switch"
#endif

#if defined(__x86_64__)
asm(".text\n.p2align 4\n.globl " EMULATED_SYMBOL "\n" EMULATED_SYMBOL ":\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n");
constexpr size_t saved_words = 6, return_word = 6;
#elif defined(__aarch64__)
asm(".text\n.p2align 4\n.globl " EMULATED_SYMBOL "\n" EMULATED_SYMBOL ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x2, sp\n  str x2, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n");
constexpr size_t saved_words = 20, return_word = 11;
#else
#error "the emulator switches fibers on x86-64 and arm64 only"
#endif

// `entry` must not return.
inline void start(Fiber& fiber, char* stack, size_t size, void (*entry)()) {
  // one word above the frame: the stack is aligned as after a call
  uintptr_t* top = reinterpret_cast<uintptr_t*>(stack + size) - 2;
  uintptr_t* frame = top - saved_words;
#if defined(__x86_64__)
  top[1] = 0;
#endif
  for (size_t i = 0; i < saved_words; ++i) frame[i] = 0;
  frame[return_word] = reinterpret_cast<uintptr_t>(entry);
  fiber.stack_pointer = frame;
}
inline void switch_fiber(Fiber& from, Fiber& to) { emulated_switch(&from.stack_pointer, to.stack_pointer); }

}  // namespace emulated
