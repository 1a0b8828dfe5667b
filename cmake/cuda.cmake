# The CUDA toolkit and the libraries beside it. Sets
#   MOE_WITH_CUDA   nvcc and cuBLASLt were found: the CUDA backend is built
#   MOE_WITH_CUDNN  cuDNN and the header-only cudnn-frontend were found (attention may use them)
#   MOE_WITH_NCCL   NCCL was found: ranks may exchange device memory
# and says what it found. Nothing found, or MOE_CUDA=OFF, builds the CPU backend alone.
set(MOE_CUDA_ARCHS "" CACHE STRING
  "GPU architectures, e.g. 90a for an H100/H200 alone; empty: all that moe-train and this nvcc know")
set(MOE_CUDNN_FRONTEND "" CACHE PATH
  "Folder that holds cudnn_frontend.h (header-only cudnn-frontend); empty: search")
set(MOE_WITH_CUDA OFF)
set(MOE_WITH_CUDNN OFF)
set(MOE_WITH_NCCL OFF)

if(NOT MOE_CUDA)
  message(STATUS "CUDA: off (MOE_CUDA=OFF); CPU backend alone")
  return()
endif()

find_program(MOE_NVCC nvcc HINTS $ENV{CUDACXX} $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
if(NOT MOE_NVCC)
  message(STATUS "CUDA: no nvcc found (looked in PATH and /usr/local/cuda/bin); CPU backend alone")
  return()
endif()

# ---- architectures: what this nvcc can still build -------------------------------------------------
execute_process(COMMAND ${MOE_NVCC} --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
if(MOE_CUDA_ARCHS)
  set(MOE_CUDA_BUILT ${MOE_CUDA_ARCHS})
else()
  set(MOE_CUDA_BUILT)
  set(missing)
  foreach(arch 70 75 80 86 89 90a)
    string(REGEX REPLACE "a$" "" plain ${arch})
    if(known MATCHES "compute_${plain}[^0-9]")
      list(APPEND MOE_CUDA_BUILT ${arch})
    else()
      list(APPEND missing ${arch})
    endif()
  endforeach()
  if(missing)
    message(STATUS "CUDA: ${MOE_NVCC} no longer builds for sm_${missing}; an older toolkit does")
  endif()
endif()
if(90 IN_LIST MOE_CUDA_BUILT AND NOT 90a IN_LIST MOE_CUDA_BUILT)
  message(STATUS "CUDA: sm_90 without 90a leaves out the Hopper expert kernels")
endif()
# Machine code for each, and PTX of the newest plain one, which later GPUs' drivers compile. (90a runs
# on 9.0 alone.)
set(plain ${MOE_CUDA_BUILT})
list(FILTER plain INCLUDE REGEX "^[0-9]+$")
list(TRANSFORM MOE_CUDA_BUILT APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
if(plain)
  list(GET plain -1 plain)
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${plain}-virtual)
endif()

# ---- compiler and libraries ------------------------------------------------------------------------
set(CMAKE_CUDA_COMPILER ${MOE_NVCC})
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
if(CMAKE_C_COMPILER_LAUNCHER AND NOT DEFINED CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_C_COMPILER_LAUNCHER})
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -lineinfo")
find_package(CUDAToolkit QUIET)
if(NOT TARGET CUDA::cublasLt OR NOT TARGET CUDA::cudart)
  message(STATUS "CUDA: ${MOE_NVCC} without cudart or cuBLASLt; CPU backend alone")
  return()
endif()
set(MOE_WITH_CUDA ON)

find_path(MOE_NCCL_INCLUDE nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS} $ENV{NCCL_HOME}/include)
find_library(MOE_NCCL_LIBRARY nccl HINTS ${CUDAToolkit_LIBRARY_DIR} $ENV{NCCL_HOME}/lib)
if(MOE_NCCL_INCLUDE AND MOE_NCCL_LIBRARY)
  set(MOE_WITH_NCCL ON)
endif()

find_path(MOE_CUDNN_INCLUDE cudnn.h HINTS ${CUDAToolkit_INCLUDE_DIRS} $ENV{CUDNN_HOME}/include)
find_library(MOE_CUDNN_LIBRARY cudnn HINTS ${CUDAToolkit_LIBRARY_DIR} $ENV{CUDNN_HOME}/lib)
find_path(MOE_CUDNN_FRONTEND_INCLUDE cudnn_frontend.h
  HINTS ${MOE_CUDNN_FRONTEND} ${MOE_CUDNN_FRONTEND}/include ${CUDAToolkit_INCLUDE_DIRS})
if(MOE_CUDNN_INCLUDE AND MOE_CUDNN_LIBRARY AND MOE_CUDNN_FRONTEND_INCLUDE)
  set(MOE_WITH_CUDNN ON)
endif()

string(REPLACE ";" " " text "${MOE_CUDA_BUILT}")
message(STATUS "CUDA: ${CUDAToolkit_VERSION}, sm ${text}; NCCL ${MOE_WITH_NCCL}; "
  "cuDNN attention ${MOE_WITH_CUDNN}")
if(MOE_CUDNN_LIBRARY AND NOT MOE_WITH_CUDNN)
  message(STATUS "CUDA: cuDNN is here but cudnn_frontend.h is not: set MOE_CUDNN_FRONTEND to its "
    "include folder; the own attention kernels run without it")
endif()
